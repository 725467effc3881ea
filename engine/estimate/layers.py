"""Time and memory of each pass of a chain: measured seconds, and bytes kept for its backward pass, counted.

Both come from running layers one by one on batches of blank samples: time and memory depend on shapes, not on what
is in a picture. Memory is counted on the ``meta`` device, where kernels are those of an accelerator.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.estimate.allocations import Allocations, storage_number
from engine.estimate.results import BlankResults, MetaResults
from engine.estimate.vocabulary import tokenizer_or_words
from engine.hosts.micro_batch import first_state
from engine.plan.plan import StagePlan
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.chain.state import State
from omnivl.data.batch import Batch, has_text, has_visual, is_video, visual_of
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.fields import FieldReader, blank_value
from omnivl.data.tokenizer import Tokenizer, batch_readers
from omnivl.objectives import MLM


def blank_batches(stage: StagePlan, tokenizer: Tokenizer, words: Sequence[int] = ()) -> list[Batch]:
    """A micro-batch of blank samples of each kind that the stage takes.

    Args:
        stage: The stage.
        tokenizer: Of its plan.
        words: Of each text, in turn; without any all texts are as long as the model reads.
    """
    sizes = stage.model.inputs
    readers = batch_readers(stage.model.text_inputs, tokenizer, sizes.text_length, tokenizer_or_words)
    objectives = tuple(objective.with_stand_ins() for objective in stage.objectives)
    prepare = Preparation(objectives, tokenizer.special, sizes, 0, readers)
    whole = any(objective.needs_whole_texts for objective in stage.objectives)
    collator = Collator(sizes, tokenizer, prepare, trims=bool(words) and not whole)
    texts = [" ".join("a" * number) for number in words or (sizes.text_length,)]
    batches = []
    for sort in stage.batch_sorts():
        kind, side = sort.entry.kind, sizes.side(is_video(sort.entry.kind))
        frames = np.zeros((sort.layout.num_frames, side, side, 3), dtype=np.uint8) if has_visual(kind) else None
        types = FieldReader(sort.entry, asked_fields(stage.objectives, kind, sort.key)).types
        fields = {name: blank_value(field, side) for name, field in types.items()}
        rows = range(sort.layout.batch_size)
        marks = "" if visual_of(kind) != "set" else _mark(stage, sort.key) * sort.layout.num_frames
        said = [marks + texts[row % len(texts)] if has_text(kind) else None for row in rows]
        examples = [Example(frames, said[row], row, 0, row, "blank", {}, fields) for row in rows]
        batches.append(collator.collate(examples, kind, sort.key, 0, types))
    return batches


def _mark(stage: StagePlan, entry: str) -> str:
    """What texts of a data entry say where a picture stands."""
    return max((one.picture_mark for one in stage.objectives if one.acts_on(entry)), default="")


def blank_states(
    stage: StagePlan,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    chain: Chain | None = None,
    words: Sequence[int] = (),
) -> list[State]:
    """The head of the chain for each of ``blank_batches``.

    Args:
        stage: The stage.
        tokenizer: Of its plan.
        device: Where the states are to be.
        chain: Says which positions of the texts it computes; without one it computes all.
        words: See ``blank_batches``.
    """
    plan = partial(plan_layout, stage.objectives)
    batches = blank_batches(stage, tokenizer, words)
    return [first_state(batch, plan, device, chain=chain if words else None) for batch in batches]


def activation_bytes(chain: Chain, states: Iterable[State]) -> dict[tuple[str, int], int]:
    """Bytes that each of ``chain.passes`` keeps for its backward pass, the largest over some micro-batches.

    Weights that are cast to another type count; weights themselves and tensors that an earlier layer keeps, or that
    are kept for later steps, do not. A recomputed part counts with its input only.

    Args:
        chain: Built on ``meta``.
        states: From ``blank_states``, on ``meta``.
    """
    found = [0] * len(chain.passes)
    for state in states:
        known = {storage_number(tensor) for tensor in chain.state_dict().values()}
        kept = [0] * len(found)
        alive: list[Tensor] = []  # a new storage may get the number of a freed one

        def keep(tensor: Tensor, place: int, known: set[int] = known, kept: Any = kept, alive: Any = alive) -> Tensor:
            if storage_number(tensor) not in known:
                known.add(storage_number(tensor))
                kept[place] += tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        followed = Allocations()
        for place, layer in enumerate(chain.program):
            followed.owner = place
            saved = torch.autograd.graph.saved_tensors_hooks(partial(keep, place=place), _same)
            with saved, accelerator_kernels(), followed:
                state = layer(state)
        held = followed.held()
        del state
        alive.clear()
        outlasting = followed.held().keys()  # masks that are made once for all steps, by whoever needs them first
        for number, (place, size) in held.items():
            if number not in known and number not in outlasting:  # not saved by autograd: inputs of what is recomputed
                kept[place] += size
        found = [max(pair) for pair in zip(found, kept, strict=True)]
    return dict(zip(chain.passes, found, strict=True))


def layer_seconds(chain: Chain, states: Sequence[State], repeats: int = 3) -> dict[tuple[str, int], float]:
    """Seconds of each of ``chain.passes``, forward and backward: means over micro-batches of the best of some repeats.

    Args:
        chain: On the device to measure. Its parameters have gradients afterwards.
        states: From ``blank_states``, on the same device.
        repeats: Measurements of each, after one that is discarded.
    """
    seconds: dict[tuple[str, int], float] = dict.fromkeys(chain.passes, 0.0)
    for state in states:
        for layer, one in zip(chain.program, chain.passes, strict=True):
            best = math.inf
            for repeat in range(repeats + 1):
                after, taken = _timed(layer, state)
                best = min(best, taken) if repeat > 0 else best
            seconds[one] += best / len(states)
            layer.discard_step()
            state = after
    return seconds


@contextmanager
def accelerator_kernels() -> Iterator[None]:
    """Runs a chain on ``meta`` with the kernels that an accelerator would use, within the block.

    On ``meta`` torch computes attention by explicit matrix products. The function is replaced within the block; a
    dispatch mode does not suffice, since it is not active while the backward pass recomputes.
    """
    usual = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = partial(_fused_attention, usual)
    try:
        with _UsualShares():  # type: ignore[no-untyped-call]
            yield
    finally:
        F.scaled_dot_product_attention = usual


def _fused_attention(
    usual: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention by the fused kernels of an accelerator where there is none; ``usual`` elsewhere."""
    if not query.is_meta:
        return usual(query, key, value, attn_mask=attn_mask, **options)
    made: Tensor
    causal = bool(options.get("is_causal"))
    if attn_mask is None and query.dtype != torch.float32:
        made = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)[0]
        return made
    if attn_mask is not None:
        added = query.new_empty(attn_mask.shape) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = added.expand(*query.shape[:3], key.shape[2])
    made = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True, 0.0, causal)[0]
    return made


_RESULTS, _BLANK = MetaResults(), BlankResults()
"""Pure functions with a memory: of all layers, chains and micro-batches that a process looks at."""


class _UsualShares(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Chooses shapes that depend on values: the usual share of a mask of words is true, half of a mask of patches.

    Also gives the shape of grouped products in fp32, which torch computes but has no rule for on ``meta``. On the CPU
    costly operations are not computed again and again.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = getattr(args[0], "device", None) if args else None
        if device == torch.device("cpu"):
            return _BLANK.call(func, args, kwargs)
        if device != torch.device("meta"):
            return _RESULTS.call(func, args, kwargs)
        if func is torch.ops.aten.nonzero.default:
            return torch.stack(_places(args[0], MLM.probability), 1)
        if func is torch.ops.aten.index.Tensor:
            chosen = [_places(one, 0.5) if _is_mask(one) else [one] for one in args[1]]
            return func(args[0], [place for places in chosen for place in places])
        if func is torch.ops.aten._grouped_mm.default:
            rows, bank = args[:2]
            ends = args[2] if len(args) > 2 else kwargs["offs"]
            groups = (len(ends),) if bank.dim() == 2 else ()  # of two tensors of rows a product for each group
            return rows.new_empty((*groups, len(rows), bank.shape[-1]))
        return _RESULTS.call(func, args, kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _places(mask: Tensor, share: float) -> list[Tensor]:
    """Indices without values, for each dimension of a mask."""
    count = math.ceil(share * mask.numel())
    return [torch.empty(count, dtype=torch.int64, device=mask.device) for _ in range(mask.dim())]


def _timed(layer: torch.nn.Module, state: State) -> tuple[State, float]:
    """The layer's detached result and the seconds of its forward and backward pass."""
    given = apart(state)
    _wait(state)
    began = time.perf_counter()
    after: State = layer(given)
    made = made_by_layer(given, after)
    if made:
        torch.autograd.backward(made, [torch.ones_like(tensor) for tensor in made])
    _wait(after)
    return apart(after), time.perf_counter() - began


def apart(state: State) -> State:
    """The state detached from the graph that made it; tensors that required a gradient are leaves that require one."""
    return State(
        {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in state.items()}, state.layout
    )


def made_by_layer(given: State, after: State) -> list[Tensor]:
    """The tensors that a layer has computed from ``given``, at which its backward pass begins."""
    return [tensor for name, tensor in after.items() if tensor.grad_fn is not None and tensor is not given.get(name)]


def _wait(state: State) -> None:
    if any(tensor.device.type == "cuda" for tensor in state.values()):
        torch.cuda.synchronize()


def _same(tensor: Tensor) -> Tensor:
    return tensor
