"""A step of a plan's stage on random batches: its losses and gradients, to compare ways of computing it."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.hosts.micro_batch import first_states
from engine.plan.plan import BatchSort, StagePlan
from engine.step.freeze import freeze_idle
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.data.batch import Batch, has_text, is_video, visual_of
from omnivl.data.collate import Collator
from omnivl.data.documents import END, PICTURE
from omnivl.data.example import Example
from omnivl.data.fields import FieldReader, blank_value
from omnivl.data.tokenizer import Tokenizer, batch_readers
from omnivl.objectives import InterleavedLM

WORDS = ("red", "heart", "cat", "face", "sun", "tree", "blue", "dog")
Shown = Sequence[NDArray[np.uint8] | None]


def micro_batches(
    stage: StagePlan,
    tokenizer: Tokenizer,
    shown: Callable[[BatchSort, np.random.Generator], Shown],
    *,
    more_words: int,
    trims: bool,
) -> list[Batch]:
    """A micro-batch of each kind; the first text has one word, each further one ``more_words`` more."""
    sizes, random, made = stage.model.inputs, np.random.default_rng(0), []
    readers = batch_readers(stage.model.text_inputs, tokenizer, sizes.text_length)
    prepare = Preparation(stage.objectives, tokenizer.special, sizes, 0, readers)
    collator = Collator(sizes, tokenizer, prepare, trims=trims)
    for sort in stage.batch_sorts():
        kind, examples = sort.entry.kind, []
        types = FieldReader(sort.entry, asked_fields(stage.objectives, kind, sort.key)).types
        for row, pixels in enumerate(shown(sort, random)):
            text = " ".join(random.choice(WORDS, 1 + more_words * row)) if has_text(kind) else None
            if visual_of(kind) == "set" and any(isinstance(one, InterleavedLM) for one in stage.objectives):
                text = PICTURE * len(pixels) + f"{text}{END}"
            fields = {name: blank_value(field, sizes.side(is_video(kind))) for name, field in types.items()}
            examples.append(Example(pixels, text, row, 0, row, "", {}, fields))
        made.append(collator.collate(examples, kind, sort.key, 0, types))
    return made


def build(stage: StagePlan, tokenizer: Tokenizer) -> Chain:
    """The stage's chain with random weights, without dropout, which draws by the shape of what it drops."""
    torch.manual_seed(0)
    chain = build_chain(stage.model, stage.objectives, tokenizer.special, gather=LocalGather())
    freeze_idle(chain, stage.layouts())
    return chain.eval()


def step(chain: Chain, stage: StagePlan, given: Sequence[Batch], *, metrics: bool = False) -> dict[str, Tensor]:
    """Losses and gradients of a step, and its metrics where they are asked for."""
    chain.zero_grad()
    torch.manual_seed(1)
    found: dict[str, Tensor] = {}
    layout = partial(plan_layout, stage.objectives)
    for place, state in enumerate(first_states(given, layout, torch.device("cpu"), chain, LocalGather())):
        out = chain(state)
        if out["loss"].requires_grad:
            out["loss"].backward()
        values = {**out.named("loss"), **(out.named("metric") if metrics else {})}
        found |= {f"{place} {name}": one.detach() for name, one in values.items()}
    return found | {name: one.grad.clone() for name, one in chain.named_parameters() if one.grad is not None}


def assert_equal(
    got: dict[str, Tensor], wanted: dict[str, Tensor], *, rtol: float, atol: float, equal_nan: bool = False
) -> None:
    """Compares what ``step`` found; ``atol`` is a share of the largest value of all."""
    assert got.keys() == wanted.keys()
    largest = max(float(tensor.abs().max()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        message = f"{name}: {got[name]} and {tensor}" if tensor.numel() == 1 else name
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol * largest, msg=message, equal_nan=equal_nan)
