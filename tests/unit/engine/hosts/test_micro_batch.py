"""A step's gradient does not depend on how its samples are divided into micro-batches, as far as a loss allows it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from small_blip2 import SMALL
from small_language import LetterTokenizer
from torch import Tensor

from engine.hosts.micro_batch import first_states
from omnivl.architectures import Architecture, OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import replica_mean
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import load_readers
from omnivl.objectives import (
    LM,
    MCM,
    MDM,
    MFM,
    MLM,
    MRM,
    VLM,
    VQA,
    Answer,
    Objective,
    PrefixLM,
    PrepareContext,
    UniVLC,
)
from omnivl.parts.language import LanguageModel
from omnivl.parts.sizes import MomentumConfig, Transformer

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
SAMPLES, LENGTH = 4, 8
TOWERS = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 16, "video_size": 16, "patch_size": 4},
    **{"num_frames": 4, "text_length": LENGTH, "vocab_size": 50, "momentum": MomentumConfig(decay=0.5)},
)
ONE = Unified(
    **{"hidden_size": 16, "num_heads": 2, "depth": 2, "projection_size": 8},
    **{"image_size": 16, "video_size": 16, "patch_size": 4, "num_frames": 2, "text_length": LENGTH, "vocab_size": 50},
)
BLOCKS = Transformer(hidden_size=24, num_heads=2, layers=2, activation="relu", norm_eps=1e-5)
WRITER = replace(SMALL, language=LanguageModel(BLOCKS, vocab_size=50, positions=20, length=10))
READERS = load_readers(WRITER.text_inputs, LetterTokenizer())

CAPTIONS = ("a", "bcdefg", "hi", "jkl")
NUM_ANSWERS = (1, 2, 0, 1)


@dataclass(frozen=True)
class Uneven(MFM):
    """Masks another number of frames in every other clip."""

    def mask(self, random, times, grid):
        made = super().mask(random, times, grid)
        if random.random() < 0.5:
            made[: times // 2] = True
            made[-1] = False
        return made


CASES: dict[str, tuple[Architecture, tuple[Objective, ...], DataKind]] = {
    "mlm, lm": (TOWERS, (MLM(probability=0.5), LM(weight=0.5)), "image_text"),
    "mlm alone, taught": (TOWERS, (MLM(probability=0.5, soft_target_alpha=0.4),), "image_text"),
    "mlm ungrounded": (TOWERS, (MLM(grounded=False, probability=0.4),), "text"),
    "frames": (TOWERS, (Uneven(), MCM(targets="momentum")), "video_text"),
    "regions": (TOWERS, (MRM(targets="momentum"),), "image"),
    "mdm": (ONE, (MDM(image_probability=0.3, text_probability=0.6),), "image_text"),
    "vqa": (TOWERS, (VQA(answers=("p", "q", "r")),), "image_text"),
    "answer": (TOWERS, (Answer(most=2, length=4),), "image_text"),
    "prefix lm": (WRITER, (PrefixLM(),), "image_text"),
}


def make_batch(
    objectives: tuple[Objective, ...], kind: DataKind, rows: list[int], identity: list[int] | None = None
) -> Batch:
    draw = torch.Generator().manual_seed(4)
    times = 4 if is_video(kind) else 1
    frames = torch.randint(0, 256, (SAMPLES, times, 3, 16, 16), dtype=torch.uint8, generator=draw)
    token_ids = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    answers = torch.zeros(SAMPLES, 10, 4, dtype=torch.int64)
    weights = torch.zeros(SAMPLES, 10)
    for row, caption in enumerate(CAPTIONS):
        written = [TOKENS.cls, *(5 + ord(letter) % 40 for letter in caption), TOKENS.sep]
        token_ids[row, : len(written)] = torch.tensor(written)
        for place in range(NUM_ANSWERS[row]):
            words = [9 + row, 12 + place][: 1 + row % 2]
            answers[row, place, : 2 + len(words)] = torch.tensor([TOKENS.cls, *words, TOKENS.sep])
            weights[row, place] = 0.4
    names = tuple(tuple("pqr"[(row + n) % 3] for n in range(NUM_ANSWERS[row])) for row in range(SAMPLES))
    own = torch.arange(SAMPLES)
    batch = Batch(
        kind,
        None if kind == "text" else frames[rows],
        None if kind == "image" else token_ids[rows],
        (own if identity is None else torch.tensor(identity))[rows],
        own[rows],
        own[rows],
        captions=tuple(CAPTIONS[row] for row in rows),
        fields={
            "answers": tuple(names[row] for row in rows),
            "answers/token_ids": answers[rows],
            "weights": weights[rows],
            "weights/present": weights[rows] > 0,
        },
    )
    context = PrepareContext(0, "test", TOKENS, (4, 4), 0, readers=READERS)
    acting = [one for one in objectives if one.demands(kind, len(rows)) is not None]
    return replace(batch, prepared={k: v for one in acting for k, v in one.prepare(batch, context).items()})


def make_chain(model: Architecture, objectives: tuple[Objective, ...]) -> Chain:
    torch.manual_seed(0)
    chain = build_chain(model, objectives, TOKENS).eval()
    for parameter in chain.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return chain


def step(chain: Chain, objectives: tuple[Objective, ...], batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients by name, and mean losses, of a step of a host."""
    chain.zero_grad()
    found: dict[str, Tensor] = {}
    layout = partial(plan_layout, objectives)
    for state in first_states(batches, layout, torch.device("cpu"), chain, LocalGather()):
        out = chain(state)
        (out["loss"] / len(batches)).backward()
        for name, loss in out.named("loss").items():
            found[f"loss {name}"] = found.get(f"loss {name}", 0.0) + loss.detach() / len(batches)
    return found | {name: p.grad.clone() for name, p in chain.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    largest = max(tensor.abs().max() for tensor in wanted.values())
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-5, atol=2e-7 * largest.item(), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("division", [[[0, 1], [2, 3]], [[0], [1], [2], [3]]], ids=["in two", "in four"])
@pytest.mark.parametrize("case", CASES)
def test_accumulated_micro_batches_have_the_gradient_of_the_joined_one(case: str, division: list[list[int]]) -> None:
    model, objectives, kind = CASES[case]
    chain = make_chain(model, objectives)
    wanted = step(chain, objectives, [make_batch(objectives, kind, [0, 1, 2, 3])])
    got = step(chain, objectives, [make_batch(objectives, kind, rows) for rows in division])
    assert_equal(got, wanted)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in wanted.items() if not name.startswith("loss"))


def test_the_mean_of_means_is_another_gradient() -> None:
    """The cases differ in their numbers of terms, so that the test above tells one from the other."""
    for case, (model, objectives, kind) in CASES.items():
        if case in ("answer", "regions"):
            continue  # a mean over samples, and masks of one size
        chain = make_chain(model, objectives)
        wanted = step(chain, objectives, [make_batch(objectives, kind, [0, 1, 2, 3])])
        alone = [step(chain, objectives, [make_batch(objectives, kind, rows)]) for rows in ([0, 1], [2, 3])]
        apart = max((wanted[n] - sum(one[n] for one in alone if n in one) / 2).abs().max().item() for n in wanted)
        assert apart > 1e-4, case


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_beforehand_is_what_the_losses_count(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, objectives, kind = CASES[case]
    chain, batch = make_chain(model, objectives), make_batch(objectives, kind, [0, 1, 2, 3])
    layout = partial(plan_layout, objectives)
    (state,) = first_states([batch], layout, torch.device("cpu"), chain, LocalGather())
    counted = {name: 1 / weight.item() for name, weight in state.named("term_weight").items()}
    seen: list[float] = []

    def counting(total, count, gather, term_weight=None):
        seen.append(float(count))
        return replica_mean(total, count, gather, term_weight)

    for module in ("masked_visual", "mdm", "vlm", "vocabulary", "vqa"):
        monkeypatch.setattr(f"omnivl.objectives.{module}.replica_mean", counting)
    chain(state)
    assert sorted(seen) == pytest.approx(sorted(counted.values()))


def test_matching_averages_over_the_pairs_of_all_micro_batches() -> None:
    """The first two samples have a negative each way, the last two, of one class, only their own pair."""
    objectives = (VLM(),)
    chain = make_chain(TOWERS, objectives)
    halves = [make_batch(objectives, "image_text", rows, [0, 1, 5, 5]) for rows in ([0, 1], [2, 3])]
    got = step(chain, objectives, halves)
    alone = [step(chain, objectives, [half]) for half in halves]
    assert_equal(got, {name: (6 * alone[0][name] + 2 * alone[1][name]) / 8 for name in alone[0]})


def test_an_objective_keeps_its_share_of_a_step_on_whose_micro_batches_it_acts_in_part() -> None:
    """Captions of four pictures in two micro-batches, and two micro-batches of clips without LM's weight changing."""
    objectives = (LM(on=("captions",)), UniVLC())
    chain = make_chain(TOWERS, objectives)
    captions = [replace(make_batch(objectives, "image_text", rows), entry="captions") for rows in ([0, 1], [2, 3])]
    others = [replace(make_batch(objectives, "video_text", rows), entry="others") for rows in ([0, 1], [2, 3])]
    got = step(chain, objectives, [captions[0], others[0], captions[1], others[1]])
    joined = replace(make_batch(objectives, "image_text", [0, 1, 2, 3]), entry="captions")
    alone = step(chain, (LM(on=("captions",)),), [joined])
    assert got["loss lm"].item() == pytest.approx(alone["loss lm"].item() / 2, rel=1e-6)


def test_micro_batches_without_any_term_give_zero_and_no_infinity() -> None:
    objectives = (VQA(answers=("nothing that anybody said",)),)
    chain = make_chain(TOWERS, objectives)
    got = step(chain, objectives, [make_batch(objectives, "image_text", rows) for rows in ([0, 1], [2, 3])])
    assert all(not tensor.any() for tensor in got.values())


def test_a_micro_batch_is_made_into_a_state_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its small tensors are those that its weights were counted from; only the frames wait for their turn."""
    model, objectives, kind = CASES["mlm, lm"]
    chain = make_chain(model, objectives)
    batches = [make_batch(objectives, kind, rows) for rows in ([0, 1], [2, 3])]
    layout, made, make = partial(plan_layout, objectives), [], State.from_batch

    def counted(*arguments: Any) -> State:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(State, "from_batch", counted)
    states = list(first_states(batches, layout, torch.device("cpu"), chain, LocalGather()))
    assert len(made) == len(states) == 2
    for whole, state in zip(made, states, strict=True):
        added = ("term_weight/", "kept/")
        assert [name for name in state if not name.startswith(added)] == list(whole)
        assert all(state[name].equal(tensor) for name, tensor in whole.items())
