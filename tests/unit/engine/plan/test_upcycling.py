"""Every architecture takes experts by two lines of a plan, from a dense stage, or a rule says why not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import small_simvlm
import torch
from torch import Tensor

from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.run.handover import HandOver, hand_over
from moe.config import DenseConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import TokenChoice
from omnivl.architectures import Architecture, ArchitectureConfig, ViLT
from omnivl.architectures.base import _with_stacks, check
from omnivl.architectures.build import build_chain, outline
from omnivl.chain.chain import Chain, text_layout, visual_layout
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.objectives import ITM, Objective, SplitLM
from omnivl.parts.sizes import Transformer, Words

EQUAL = TokenChoice(renormalise=True)  # a token's weights add up to one
FILLINGS: Mapping[str, FeedForwardConfig] = {
    "limoe": LIMoEConfig(num_experts=2, router=EQUAL),
    "mome": MoMEConfig(),
    "both": MoMELIMoEConfig(pools={"image": 1, "video": 1, "text": 1}, common_experts=1, router=EQUAL),
}
LINES = {
    "limoe": "{kind: limoe, num_experts: 2, router: {kind: token_choice, renormalise: true}}",
    "mome": "{kind: mome}",
    "both": "{kind: mome_limoe, pools: {image: 1, video: 1, text: 1}, common_experts: 1, router: {kind: token_choice, "
    "renormalise: true}}",
}
KINDS: Mapping[str, type[Architecture]] = {kind.__name__: kind for kind in get_args(get_args(ArchitectureConfig)[0])}
CASES = [
    pytest.param(
        *(kind, preset, name), id=f"{kind}-{preset}-{name}", marks=[] if preset in ("tiny", "") else [pytest.mark.full]
    )
    for kind, cls in KINDS.items()
    for preset in (*cls.presets, "")
    for name in FILLINGS
]
DENSE_ONLY = {"BLIP": ["text"], "BLIP2": ["vision", "qformer"], "GIT": ["decoder"], "METER": ["fusion"]}
DENSE_ONLY |= {"PaLI": ["encoder", "decoder"]}
DENSE_ONLY |= {kind: ["vision", "language.blocks"] for kind in ("Flamingo", "Frozen")}
"""Stacks that can only be dense, by architecture; the rules name them."""


def refusals(kind: str, name: str) -> list[str]:
    """Beginnings of what the rules say of an architecture all of whose stacks are to have experts."""
    filling = FILLINGS[name].kind
    found = [f"model.{stack}.ffn.kind: got {filling!r}; allowed 'dense' in " for stack in DENSE_ONLY.get(kind, [])]
    if kind == "METER" and name != "mome":  # its pictures are CLIP's, and experts have no such activation
        found.insert(0, f"model.vision.activation: got 'quick_gelu' with ffn kind {filling!r}; allowed 'gelu' where")
    return found


def model_of(kind: str, preset: str) -> Architecture:
    return KINDS[kind].presets[preset] if preset else KINDS[kind]()


@pytest.mark.parametrize(("kind", "preset", "name"), CASES)
def test_a_preset_is_upcycled_or_a_rule_names_the_stacks_that_stay_dense(kind: str, preset: str, name: str) -> None:
    model = model_of(kind, preset).refilled(lambda _: FILLINGS[name])
    try:
        check(model)
    except ModelError as error:
        assert refusals(kind, name)
        for line, wanted in zip(str(error).splitlines(), refusals(kind, name), strict=True):
            assert line.startswith(wanted)
        return
    assert not refusals(kind, name)
    dense = outline(model.refilled(lambda _: DenseConfig()))
    report = taken_over(outline(model), dense.state_dict())
    assert report.upcycled
    assert {one.rpartition(".ffn.")[2] for one in report.created} <= {"router.gate.weight"}
    assert not report.dropped


def taken_over(chain: Chain, weights: Mapping[str, Tensor]) -> HandOver:
    with torch.device("meta"):
        return hand_over(chain, weights, "dense")


def narrow(kind: str) -> Architecture:
    """The architecture with narrow stacks, for those without a small preset."""
    model = _with_stacks(KINDS[kind](), lambda stack: replace(stack, hidden_size=16, num_heads=2, layers=2))
    return replace(model, **{"image_size": 32, "patch_size": 16, "text_length": 8, "vocab_size": 50})


SMALL = {kind: cls.presets["tiny"] for kind, cls in KINDS.items() if "tiny" in cls.presets and kind != "SimVLM"}
SMALL |= {kind: narrow(kind) for kind in ("ALBEF", "FLAVA")}


def outputs(chain: Chain, model: Architecture) -> list[Tensor]:
    """Last states of the encoders of pictures and texts, as far as the chain has them apart."""
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 1, 3, *[model.inputs.image_size] * 2), dtype=torch.uint8, generator=random)
    words = torch.randint(5, 40, (2, model.inputs.text_length), generator=random)
    made = []
    for given, layout in (({"frames": frames}, visual_layout(frames)), ({"token_ids": words}, text_layout(2))):
        state = chain.fold(State(given, layout))
        made += [state[stream] for stream in ("visual", "text") if stream in state]
        made += [state[f"{stream}_embedding"] for stream in ("visual", "text") if f"{stream}_embedding" in state]
    return made


@pytest.mark.parametrize("name", FILLINGS)
@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind not in DENSE_ONLY])
def test_an_upcycled_model_equals_the_dense_one_at_first(kind: str, name: str) -> None:
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
    plain = SMALL[kind].refilled(lambda _: DenseConfig())
    torch.manual_seed(0)
    dense = build_chain(plain, (), tokens).eval()
    torch.manual_seed(1)
    model = plain.refilled(lambda _: FILLINGS[name])
    sparse = build_chain(model, (), tokens).eval()
    with torch.no_grad():
        before = outputs(sparse, model)
        hand_over(sparse, dense.state_dict(), "dense")
        wanted, got = outputs(dense, plain), outputs(sparse, model)
    assert wanted
    for one, other, unlike in zip(got, wanted, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(unlike, other, rtol=1e-2, atol=1e-2)


VILT = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=2),
    words=Words(length=8, vocab_size=50),
    **{"image_size": 32, "patch_size": 16},
)
JOINED: Mapping[str, tuple[Architecture, Objective]] = {
    "SimVLM": (small_simvlm.SMALL, SplitLM()),
    "ViLT": (VILT, ITM(alignment_weight=0.0, replaced=0.01)),
}
"""Architectures that read pictures and texts in one stack, and an objective on them."""


@pytest.mark.parametrize("name", FILLINGS)
@pytest.mark.parametrize("kind", JOINED)
def test_the_loss_of_joined_pictures_and_texts_stays(kind: str, name: str) -> None:
    plain, objective = JOINED[kind]
    torch.manual_seed(0)
    dense = build_chain(plain, (objective,), small_simvlm.TOKENS).eval()
    torch.manual_seed(1)
    sparse = build_chain(plain.refilled(lambda _: FILLINGS[name]), (objective,), small_simvlm.TOKENS).eval()
    batch = small_simvlm.simvlm_batch((objective,))
    with torch.no_grad():
        before = small_simvlm.run(sparse, batch, (objective,))[f"loss/{objective.key}"]
        hand_over(sparse, dense.state_dict(), "dense")
        wanted, got = (small_simvlm.run(one, batch, (objective,))[f"loss/{objective.key}"] for one in (dense, sparse))
    torch.testing.assert_close(got, wanted)
    assert abs(before - wanted) > 1e-3


OBJECTIVES = {"omnivl": "univlc", "unified": "univlc", "clip": "itc", "coca": "itc", "blip": "itc", "vilt": "itm"}
OBJECTIVES |= {"simvlm": "split_lm", "git": "lm", "flava": "itc", "albef": "itc", "align": "itc", "meter": "itm"}


def plan(kind: str, name: str, preset: str) -> str:
    """A dense stage, and one that differs by the two lines of experts."""
    return f"""
name: upcycled
model: {{kind: {kind}{f", preset: {preset}" if preset else ""}}}
batch: {{micro_batch_size_per_gpu: 2}}
stages:
  - name: dense
    steps: 1
    data: [{{source: emoji, kind: image_text}}]
    objectives: [{OBJECTIVES[kind]}]
  - name: sparse
    init_from: dense
    model: {{ffn: {LINES[name]}}}
    steps: 1
    data: [{{source: emoji, kind: image_text}}]
    objectives: [{OBJECTIVES[kind]}]
"""


@pytest.mark.parametrize("name", FILLINGS)
@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_two_lines_of_a_plan_are_enough(kind: str, name: str) -> None:
    cls = next(cls for cls in KINDS.values() if cls.kind == kind)
    text = plan(kind, name, "tiny" if "tiny" in cls.presets else "")
    if wanted := refusals(cls.__name__, name):
        with pytest.raises(PlanError) as raised:
            parse_plan(text)
        assert all(line in str(raised.value) for line in wanted)
        return
    dense, sparse = parse_plan(text).stages
    assert {one.kind for one in dense.model.fillings.values()} == {"dense"}
    assert all(one == FILLINGS[name] for one in sparse.model.fillings.values())
    assert sparse.model.refilled(lambda _: DenseConfig()) == dense.model


def test_a_stack_keeps_the_filling_that_it_names() -> None:
    text = plan("clip", "limoe", "tiny").replace("model: {ffn:", "model: {text: {ffn: {kind: dense}}, ffn:")
    stage: Any = parse_plan(text).stages[1]
    assert (stage.model.vision.ffn.kind, stage.model.text.ffn.kind) == ("limoe", "dense")


def test_a_mistake_in_what_all_stacks_get_is_told_where_it_stands() -> None:
    text = plan("clip", "limoe", "tiny").replace("num_experts: 2", "num_expert: 2")
    line = 1 + text[: text.index("num_expert:")].count("\n")
    with pytest.raises(PlanError) as raised:
        parse_plan(text)
    assert f"<plan>:{line}: stages.1.model.vision.ffn.num_expert: got an unknown key" in str(raised.value)
    assert "did you mean 'num_experts'?" in str(raised.value)


def test_blip_has_experts_in_its_visual_encoder() -> None:
    text = plan("blip", "limoe", "tiny").replace("model: {ffn:", "model: {text: {ffn: {kind: dense}}, ffn:")
    stage: Any = parse_plan(text).stages[1]
    assert stage.model == replace(stage.model, vision=replace(stage.model.vision, ffn=FILLINGS["limoe"]))
