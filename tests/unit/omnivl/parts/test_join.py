from dataclasses import replace

import pytest
import torch
from encoded import MOMENTUM, SIZES, B, D, L, S, encoded
from torch import Tensor

from omnivl.chain.demands import Demands, Join
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.objectives import LM, MFM, MLM, MRM, VLM
from omnivl.parts.join import JoinRows
from omnivl.parts.project import Project


def joined(objectives: list[Objective], state: State, temperature: float | None = None) -> State:
    """What stands behind the projections and the join."""
    project = Project(SIZES, objectives, MOMENTUM)
    if temperature is not None:
        project.logit_scale.data.fill_(temperature)
    return JoinRows(objectives)(project(state))


def test_fused_rows_of_mlm_and_vlm() -> None:
    objectives: list[Objective] = [VLM(), MLM()]
    state = encoded(objectives)
    out = joined(objectives, state)
    assert list(state.layout.fused) == ["vlm/positive", "vlm/negative_visual", "vlm/negative_text", "mlm"]
    text, masked = state["text"][:B], state["text"][B:]
    rows = {name: out["fused"][segment] for name, segment in state.layout.fused.items()}
    memory = {name: out["fused_memory"][segment].tolist() for name, segment in state.layout.fused.items()}
    own = [0, 1, 2]
    assert torch.equal(rows["vlm/positive"], text)
    assert torch.equal(rows["vlm/negative_visual"], text)
    assert torch.equal(rows["mlm"], masked)
    assert memory["vlm/positive"] == memory["vlm/negative_text"] == memory["mlm"] == own
    assert all(negative != i for i, negative in enumerate(memory["vlm/negative_visual"]))
    chosen = [next(j for j in own if torch.equal(row, text[j])) for row in rows["vlm/negative_text"]]
    assert all(negative != i for i, negative in enumerate(chosen))
    masks = out["fused_mask"][state.layout.fused["vlm/negative_text"]]
    assert torch.equal(masks, state["text_mask"][:B][chosen])
    assert torch.equal(out["fused_mask"][state.layout.fused["mlm"]], state["text_mask"][B:])
    assert out["vlm/has_negative"].all()
    assert out["memory"].data_ptr() == state["visual"].data_ptr(), "no visual feature is copied"


def test_equal_identity_is_never_a_negative() -> None:
    # Samples 0 and 1 are the same concept: their only negative is 2; 2 may draw either.
    state = encoded([VLM()], identity=(7, 7, 8))
    out = joined([VLM()], state)
    negatives = out["fused_memory"][state.layout.fused["vlm/negative_visual"]].tolist()
    assert negatives[:2] == [2, 2]
    assert negatives[2] in (0, 1)
    assert out["vlm/has_negative"].tolist() == [True] * 3
    one_class = joined([VLM()], encoded([VLM()], identity=(7, 7, 7)))
    assert one_class["vlm/has_negative"].tolist() == [False] * 3


def test_negatives_follow_the_similarities() -> None:
    """At the lowest temperature the most similar other sample is drawn, in both directions."""
    state = encoded([VLM(epsilon=0.0)])
    out = joined([VLM(epsilon=0.0)], state, temperature=100.0)
    similarity = out["text_embedding"] @ out["visual_embedding"].t() - 10.0 * torch.eye(B)
    negatives = out["fused_memory"][state.layout.fused["vlm/negative_visual"]]
    assert negatives.tolist() == similarity.argmax(1).tolist()
    texts = out["fused"][state.layout.fused["vlm/negative_text"]]
    assert torch.equal(texts, state["text"][:B][similarity.argmax(0)])


def test_masked_passes_become_features_of_their_objective() -> None:
    objectives: list[Objective] = [MRM(targets="momentum"), LM()]
    state = encoded(objectives)
    out = joined(objectives, state)
    assert torch.equal(out["visual/mrm"], state["visual"][state.layout.visual["mrm"]])
    assert torch.equal(out["memory"], state["visual"][:B])
    assert "momentum_visual" in out
    assert "momentum_text" not in out
    assert "fused" not in out


def test_a_stage_without_clean_streams_passes() -> None:
    objective = MFM()
    layout = plan_layout([objective], "video_text", B, 4)
    state = State({"visual": torch.randn(B, S, D), "identity": torch.arange(B)}, layout)
    assert set(joined([objective], state)) == {"identity", "visual/mfm"}


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_matching_pairs_texts_with_the_named_rows(rows: list[int] | None) -> None:
    text = torch.randn(2, L, D)
    mask = torch.ones(2, L, dtype=torch.bool)
    tensors: dict[str, Tensor] = {"visual": torch.randn(B, S, D), "text": text, "text_mask": mask}
    if rows is not None:
        tensors["join/rows"] = torch.tensor(rows)
    layout = replace(
        lay_out({"vlm": VLM().asks("image_text", 2)}, "image_text", 2, 1, "predict"), visual={"clean": slice(0, B)}
    )
    out = JoinRows([VLM()])(State(tensors, layout))
    assert out["fused_memory"].tolist() == ([0, 1] if rows is None else rows)
    assert torch.equal(out["fused"], text)
    assert torch.equal(out["memory"], tensors["visual"])


def test_rows_may_look_at_several_segments_end_to_end() -> None:
    """Two texts, each beside both halves of a pair of pictures; the segments lie one after the other."""
    demands = Demands(rows={"visual": {"pair/second": B}}, joins={"pair": Join(sees=("clean", "pair/second"))})
    layout = lay_out({"pair": demands}, "image_text", B, 1, "train")
    visual, text = torch.randn(2 * B, S, D), torch.randn(B, L, D)
    mask = torch.ones(B, L, dtype=torch.bool)
    out = JoinRows([])(State({"visual": visual, "text": text, "text_mask": mask}, layout))
    assert torch.equal(out["memory"][out["fused_memory"]], torch.cat([visual[:B], visual[B:]], dim=1))


def test_rows_of_unequal_lengths_are_refused() -> None:
    joins = {"one": Join(), "two": Join(sees=("clean", "two/second"))}
    demands = Demands(rows={"visual": {"two/second": B}}, joins=joins)
    layout = lay_out({"both": demands}, "image_text", B, 1, "train")
    tensors = {"visual": torch.randn(2 * B, S, D), "text": torch.randn(B, L, D), "text_mask": torch.ones(B, L) > 0}
    with pytest.raises(ModelError) as caught:
        JoinRows([])(State(tensors, layout))
    assert str(caught.value) == (
        "texts of one step look at 5 and 10 visual positions; allowed is one number; put the objectives into stages or "
        "data entries of their own"
    )
