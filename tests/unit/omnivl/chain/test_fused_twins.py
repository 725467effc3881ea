"""Fused rows as the momentum twins make them: which rows, of which weights, at which cost."""

from dataclasses import dataclass, replace

import pytest
import torch
from small_towers import scattered
from tiny_chain import CONFIG, TOKENS, make_batch
from torch.utils.flop_counter import FlopCounterMode

from omnivl.architectures import Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.demands import Demands
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.objectives import MLM, MRM, VLM, UniVLC
from omnivl.parts import attention
from omnivl.parts.losses import Losses

TAUGHT = MLM(soft_target_alpha=0.4)


@dataclass(frozen=True)
class TaughtVLM(VLM):
    """Matching whose every row has a teacher, those of drawn samples included."""

    def demands(self, kind, batch_size):
        asked = super().demands(kind, batch_size)
        return None if asked is None else replace(asked, reads=frozenset({"momentum_fused"}))


def started(objectives, kind="image_text"):
    torch.manual_seed(0)
    chain = build_chain(replace(CONFIG, patch_dropout=0.0), objectives, TOKENS)
    batch = make_batch(kind, objectives)
    return chain, State.from_batch(batch, plan_layout(objectives, kind, 4, batch.num_frames))


def before_losses(chain, state):
    for layer in chain.program:
        state = state if isinstance(layer, Losses) else layer(state)
    return state


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize(
    "objectives",
    [
        (TAUGHT,),
        (UniVLC(queue_size=8), VLM(), TAUGHT),
        (TaughtVLM(), UniVLC()),
        (TaughtVLM(negatives="global"), TAUGHT, UniVLC(batch_keys="momentum"), MRM(targets="momentum")),
    ],
    ids=lambda value: "+".join(one.key for one in value),
)
def test_rows_are_what_the_twins_weights_make_of_the_same_inputs(objectives, kind):
    chain, state = started(objectives, kind)
    teacher, _ = started(objectives, kind)
    asking = [
        name
        for name in state.layout.fused
        if name.split("/")[0] in ("mlm", *("vlm",) * (VLM not in map(type, objectives)))
    ]
    assert list(state.layout.segments("momentum_fused")) == asking
    scattered(teacher)
    online = dict(teacher.named_parameters())
    for name, parameter in chain.named_parameters():
        if ".momentum_block." in name:
            parameter.data.copy_(online[name.replace(".momentum_block.", ".block.")])
    # Samples are drawn by the student's embeddings: the same rows for the teacher's chain.
    student, drawn = before_losses(chain, state), [one for one in objectives if isinstance(one, TaughtVLM)]
    for one in drawn:
        choice = one.draw(chain_at_join(chain, state), chain.join.gather)
        teacher.join.objectives["vlm"] = Fixed(choice)
    wanted = before_losses(teacher, state)
    for name in asking:
        made = student.rows("momentum_fused", name)
        assert not made.requires_grad
        torch.testing.assert_close(made, wanted.rows("fused", name).detach(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(made, student.rows("fused", name), atol=1e-2)


def chain_at_join(chain, state):
    for layer in chain.program:
        if layer is chain.join:
            return state
        state = layer(state)
    raise AssertionError("no join")


@dataclass(frozen=True)
class Fixed:
    """Draws what it is told."""

    choice: object

    def draw(self, state, gather):
        return self.choice


def test_losses_read_the_clean_rows_of_a_twin_that_computes_others_too():
    chain, state = started((TAUGHT,))
    asked = {"mlm": TAUGHT.demands("image_text", 4), "reader": Demands(reads=frozenset({"momentum_text"}))}
    layout = lay_out(asked, "image_text", 4, 1, "train")
    assert layout.twins["text"] == {"clean": slice(0, 4), "mlm": slice(4, 8)}
    out = before_losses(chain, State(state, layout))
    alone = lay_out({"reader": asked["reader"]}, "image_text", 4, 1, "train")
    torch.testing.assert_close(out["momentum_text"], before_losses(chain, State(state, alone))["momentum_text"])


def test_twins_are_built_and_moved_where_somebody_reads_them():
    objectives = (TAUGHT, UniVLC(queue_size=8), VLM())
    chain, state = started(objectives)
    hard, _ = started(tuple(replace(one, soft_target_alpha=0.0) if one is TAUGHT else one for one in objectives))
    own, plain = (dict(one.named_parameters()) for one in (chain, hard))
    added = own.keys() - plain.keys()
    assert {name.split(".")[0] for name in added} == {"alignment_00", "alignment_01", "losses"}
    assert all("momentum_" in name and not own[name].requires_grad for name in added)
    assert plain.keys() < own.keys()
    chain(state)["loss"].backward()
    for name in added:
        assert torch.equal(own[name], own[name.replace("momentum_", "")])
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    before = {name: own[name].clone() for name in added}
    chain.after_step()
    for name in added:
        torch.testing.assert_close(own[name], before[name] + 0.005, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("objectives", [(TAUGHT,), (UniVLC(queue_size=8), TAUGHT, VLM()), (TaughtVLM(), UniVLC())])
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_operations_are_what_torch_counts(monkeypatch, objectives, kind):
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    monkeypatch.setattr(MLM, "restored_words", property(lambda self: {self.key: 1 / 8}))
    chain, _ = started(objectives, kind)
    batch = make_batch(kind, objectives)
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == TOKENS.pad, 9))
    targets = torch.full((4, 8), -100)
    targets[:, 1] = 5  # one of eight positions of each text, which are chosen in whole quarters of the rows
    given = {}
    if "mlm/targets" in batch.prepared:
        given = {"mlm/token_ids": batch.token_ids, **prepared_targets("mlm", targets)}
    state = State.from_batch(batch, plan_layout(objectives, kind, 4, batch.num_frames)).merged(given)
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, state.layout), rel=5e-3)


def test_architectures_without_such_twins_refuse_who_reads_them():
    with pytest.raises(ModelError, match="asks for the stream 'momentum_fused'; architecture 'unified' has "):
        build_chain(Unified.like(CONFIG), (TAUGHT,), TOKENS)
