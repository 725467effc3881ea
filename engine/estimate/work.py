"""Operations and memory of a stage's model in one micro-batch on one process: counted, not computed by formulas.

The layers run one by one, forward and backward, on blank samples: on ``meta``, without memory and by the kernels of an
accelerator, or on the CPU by its own. Traffic is counted in the calls that the model makes: rows that are gathered over
replicas, rows that routers send to experts, the state that passes from one layer to the next.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.estimate.banks import BankCounter, BankWork, calls_of_banks, even_loads
from engine.estimate.forms import layer_form, state_form
from engine.estimate.fused import PassCounter
from engine.estimate.layers import accelerator_kernels, activation_bytes, apart, blank_states, made_by_layer
from engine.estimate.live import LivePeak, live_peak
from engine.estimate.matrices import Matrices, layer_matrices
from engine.estimate.operations import Operations, weighted
from engine.estimate.trained import mark_trained
from engine.hosts.pipeline.reads import Notes, ReadState, Wanted, notes_of, unread
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.plan import StagePlan
from engine.plan.precision import dtype_of
from engine.step.freeze import is_unread, store_frozen
from engine.step.optimizer import muon_parameters
from moe.sparse import served_shares
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import EMBEDDING_STACK, Chain, ChainLayer
from omnivl.chain.flops import chain_flops, num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.data.tokenizer import Tokenizer
from omnivl.objectives.teacher import stand_in_teachers
from omnivl.parts.block import BlockLayer

REORDERED = 7.0
"""Bytes read and written per byte of rows that are sent to experts and back, the mean of both directions: rows that
arrive are brought into the experts' order and out of it again, and those that come back are padded. A test counts
them."""


@dataclass(frozen=True)
class LayerSize:
    """Sizes of a layer: parameters in elements of four bytes, but for the halved; buffers in bytes.

    Attributes:
        trained: Parameters that get a gradient, experts among them.
        frozen: Parameters without one, momentum twins left out.
        twins: Parameters of momentum twins.
        experts: Those of ``trained`` that lie in banks of sparse experts, which can be split over processes.
        resting_experts: Those of ``frozen`` and ``twins`` in such banks.
        active: Those of ``trained`` that one token uses.
        queue: Bytes of buffers: the momentum queue, selection biases.
        halved: Those of ``frozen`` that are kept in two bytes.
        matrices: Those of ``trained`` that Muon moves.
        unread: Those that no step reads, experts left out.
        unread_experts: Those in banks of sparse experts that no step reads.
        cast: Those read ones that every use casts to two bytes, experts left out.
        cast_experts: Likewise in banks of sparse experts.
        rounded: Those of ``cast`` that are trained, and that no momentum twin reads as they are.
        rounded_experts: Likewise of ``cast_experts``.
    """

    trained: int
    frozen: int
    twins: int
    experts: int
    resting_experts: int
    active: int
    queue: int
    halved: int = 0
    matrices: tuple[Matrices, ...] = ()
    unread: int = 0
    unread_experts: int = 0
    cast: int = 0
    cast_experts: int = 0
    rounded: int = 0
    rounded_experts: int = 0

    @property
    def gathered(self) -> float:
        """Bytes that ZeRO-3 gathers of the layer for each pass, experts left out."""
        return 4.0 * (self.elements - self.experts - self.resting_experts - self.unread) - 2.0 * self.cast

    @property
    def gathered_experts(self) -> float:
        """Bytes that it gathers of banks of sparse experts, of all parts."""
        return 4.0 * (self.experts + self.resting_experts - self.unread_experts) - 2.0 * self.cast_experts

    @property
    def elements(self) -> int:
        """All parameters."""
        return self.trained + self.frozen + self.twins


@dataclass(frozen=True)
class Pass:
    """One pass of a layer in one micro-batch; means over the stage's kinds of batches.

    Attributes:
        layer: Its name. Blocks of the unified transformer have two passes.
        forward: Operations of the forward pass.
        backward: Operations of the backward pass, with what is recomputed in it.
        joined: Bytes of this process' rows that the forward pass gathers from all replicas.
        joined_gradient: Bytes of the whole gathered gradient that the backward pass sums over the replicas.
        joins: Number of collectives of the forward pass, and sums of scalars among them.
        routed: Bytes of the rows that the forward pass sends to experts and back.
        routed_gradient: Bytes that go the same way in the backward pass: gradients of rows, which those of twins have
            not, and the rows once more where they are recomputed.
        crossing: Bytes of that part of the state after the layer that later passes read, as a pipeline sends it.
        crossing_gradient: Bytes of its gradient.
        activations: Bytes that the pass keeps for its backward pass, the largest over the kinds of batches.
        banks: What of the forward pass' operations banks of sparse experts do.
        banks_backward: Likewise of the backward pass, with what is recomputed in it.
        reordered: Bytes read and written beside the exchange per byte of rows that are sent there and back.
    """

    layer: str
    forward: Operations
    backward: Operations
    joined: float
    joined_gradient: float
    joins: float
    routed: float
    routed_gradient: float
    crossing: float
    crossing_gradient: float
    activations: int
    banks: BankWork = field(default_factory=BankWork)
    banks_backward: BankWork = field(default_factory=BankWork)
    reordered: float = REORDERED


@dataclass(frozen=True)
class ModelWork:
    """A stage's model with a micro-batch of some size.

    Attributes:
        passes: Along the chain.
        layers: Sizes of each layer, in the chain's order.
        batch: Samples of the micro-batch.
        zero: How much ZeRO gathers and reduces at a time.
        peaks: The most that a micro-batch of each kind needs beyond parameters.
        useful_flops: Floating point operations of a sample's products that MFU counts, forward and backward.
        frames: Images of a sample, frames of clips counted one by one; the mean over kinds.
    """

    passes: tuple[Pass, ...]
    layers: Mapping[str, LayerSize]
    batch: int
    zero: ZeroSizes
    peaks: tuple[LivePeak, ...]
    useful_flops: float
    frames: float


class BlankGather:
    """Gathers blank rows in place of those of other replicas, and counts the bytes that would be sent."""

    def __init__(self, replicas: int) -> None:
        self.replicas, self.replica = replicas, 0
        self.joined: float = 0
        self.gradient: float = 0
        self.calls = 0
        self.in_backward = False

    def join(self, tensor: Tensor) -> Tensor:
        """``[B, ...]`` repeated as often as there are replicas.

        In the backward pass counted as the sum of a tensor in which a process sends as much.
        """
        self.calls += 1
        if self.in_backward:
            self.gradient += self.replicas * tensor.nbytes / 2
        else:
            self.joined += tensor.nbytes
        if tensor.requires_grad:
            self.gradient += self.replicas * tensor.numel() * 4  # summed in fp32
        return tensor.repeat(self.replicas, *[1] * (tensor.dim() - 1))

    def total(self, tensor: Tensor) -> Tensor:
        """A copy."""
        self.calls += 1
        return tensor.detach().clone()

    def share_of_total(self, tensor: Tensor) -> Tensor:
        """The first rows."""
        self.gradient += tensor.nbytes
        return tensor[: len(tensor) // self.replicas].clone()

    def trade(self, tensor: Tensor) -> Tensor:
        """A copy. A process sends as much as for a gather of a replica's rows."""
        self.calls += 1
        self.joined += tensor.nbytes / self.replicas
        return tensor.clone()

    def fetch(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Rows of the tensors. Each travels once, and its gradient once: a share of a gather and half a reduction."""
        self.calls += 1
        places = rows % len(tensors[0])
        for tensor in tensors:
            size = len(rows) * tensor[0].nbytes
            self.joined += size / self.replicas
            self.gradient += size / 2 if tensor.requires_grad else 0
        return [tensor.index_select(0, places) for tensor in tensors]

    def shift(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Copies; in the forward pass a block takes a hop less than there are replicas, which together are a gather.

        In the backward pass blocks go round once more, and their gradients with them: counted as the sum of a tensor in
        which a process sends as much.
        """
        sent = sum(tensor.nbytes for tensor in tensors)
        self.calls += 1
        if self.in_backward:
            self.gradient += sent * self.replicas / (2 * (self.replicas - 1))
        else:
            self.joined += sent / (self.replicas - 1)
        return lambda: [tensor.clone() for tensor in tensors]


def model_work(
    stage: StagePlan, tokenizer: Tokenizer, replicas: int, device: torch.device, words: int | None = None
) -> ModelWork:
    """Counts a stage's model under the stage's micro-batch.

    Args:
        stage: Model, objectives, data, micro-batch and precision, which is not ``auto``.
        tokenizer: The plan's.
        replicas: Processes that take samples of their own.
        device: ``meta`` for an accelerator's kernels, the CPU for a CPU's.
        words: Of a caption; None: captions are as long as the model reads.

    Raises:
        UserError: The configuration does not fit together.
    """
    gather = BlankGather(replicas)
    dtype = dtype_of(stage.parallel.precision)
    with device:
        chain = build_chain(stage.model, stage.objectives, tokenizer.special, gather=gather, compute_dtype=dtype)
    mark_trained(chain, stage)
    store_frozen(chain, stage.model.stacks)
    stand_in_teachers(chain)
    chain.train()
    states = blank_states(stage, tokenizer, device, chain=chain, words=() if words is None else (words,))
    with even_loads(chain):
        kept = activation_bytes(chain, states)
        compiled = stage.parallel.compile and device.type == "meta"
        found = [_crossing(list(_passes(chain, state, gather, kept, compiled=compiled))) for state in states]
        peaks = tuple(live_peak(chain, state) for state in states)
    weights = [sort.share for sort in stage.batch_sorts()]
    moved = muon_parameters(chain, stage.optimizer)
    mean = [_mean(passes, weights) for passes in zip(*found, strict=True)]
    if stage.contrasts_step:
        stacks = [layer.stack for layer in chain.program]
        mean = [
            _embedding_twice(one) if place <= stacks.index(EMBEDDING_STACK) else one for place, one in enumerate(mean)
        ]
    length = stage.model.inputs.text_length
    tokens = None if words is None else min(words + 2, length)  # the start and the end
    flops = (_useful(chain, state.layout, tokens) / state.layout.batch_size for state in states)
    return ModelWork(
        passes=tuple(mean),
        layers={name: _size(layer, moved) for name, layer in chain.named_layers.items()},
        batch=stage.batch.micro_batch_size_per_gpu,
        zero=ZeroSizes.of(chain.layers),
        peaks=peaks,
        useful_flops=sum(weight * one for weight, one in zip(weights, flops, strict=True)),
        frames=sum(weight * state.layout.num_frames for weight, state in zip(weights, states, strict=True)),
    )


@dataclass(frozen=True)
class _Passed:
    """A pass, and what a cut behind it would send.

    Attributes:
        found: The pass, as if nothing crossed.
        notes: What it read and made.
        after: Bytes of each tensor of the state behind it, and whether it has a gradient.
    """

    found: Pass
    notes: Notes
    after: Mapping[str, tuple[int, bool]]


def _crossing(passed: Sequence[_Passed]) -> list[Pass]:
    """The passes with the bytes that cross behind each: of what later passes read."""
    found: list[Pass] = []
    wanted = Wanted()
    for one in reversed(passed):
        sizes = [size for name, size in one.after.items() if name in wanted]
        gradient = sum(size for size, carried in sizes if carried)
        found.append(replace(one.found, crossing=sum(size for size, _ in sizes), crossing_gradient=gradient))
        wanted = one.notes.wanted(wanted)
    return found[::-1]


def _passes(
    chain: Chain, state: State, gather: BlankGather, kept: Mapping[tuple[str, int], int], *, compiled: bool
) -> Iterator[_Passed]:
    """Runs the layers in their order, each forward and backward; ``kept`` are bytes left for the latter.

    A pass of the same form as an earlier one is not run again. Operations of compiled blocks are counted as the
    compiler joins them, but for those with sparse experts, whose part is counted by itself.
    """
    known: dict[Hashable, tuple[_Passed, State]] = {}
    forms, counter = {id(layer): layer_form(layer) for layer in chain.layers}, BankCounter()
    for layer, one_pass in zip(chain.program, chain.passes, strict=True):
        form = forms[id(layer)], state_form(state)
        if form in known:
            found, state = known[form]
            yield replace(found, found=replace(found.found, layer=one_pass[0], activations=kept[one_pass]))
            continue
        gather.joined = gather.gradient = gather.calls = 0
        fused = compiled and isinstance(layer, BlockLayer) and not served_shares(layer)
        operations = PassCounter(fused=fused)
        with ExitStack() as stack:
            stack.enter_context(accelerator_kernels())
            calls = stack.enter_context(calls_of_banks(layer))
            watched = ReadState.of(apart(state))
            with operations.forward():
                after = layer(watched)
            notes = notes_of(watched, after)
            given, after = unread(watched), unread(after)
            made = made_by_layer(given, after)
            gradients = [torch.ones_like(tensor) for tensor in made]
            joined, joins = gather.joined, gather.calls
            called = list(calls)
            if made:
                gather.in_backward = True
                with operations.backward(made):
                    torch.autograd.backward(made, gradients)
                gather.in_backward = False
            again = calls[len(called) :]
            banks, banks_backward = counter.work(called, again)
        for parameter in layer.parameters():
            parameter.grad = None
        layer.discard_step()
        state = apart(after)
        forward, backward = operations.found()
        made_here = Pass(
            layer=one_pass[0],
            forward=forward,
            backward=backward,
            joined=joined,
            joined_gradient=gather.gradient,
            joins=joins,
            routed=sum(one.sent for one in called),
            routed_gradient=sum(one.sent for one in called if one.carried) + sum(one.sent for one in again),
            crossing=0.0,
            crossing_gradient=0.0,
            activations=kept[one_pass],
            banks=banks,
            banks_backward=banks_backward,
        )
        found = _Passed(made_here, notes, {name: (one.nbytes, one.requires_grad) for name, one in state.items()})
        known[form] = found, state
        yield found


def _size(layer: ChainLayer, moved: frozenset[int]) -> LayerSize:
    """Sizes of a layer that has run: only then is known what it casts."""
    shares = served_shares(layer)
    named = list(layer.named_parameters())
    twins = {id(one) for name, one in named if name.startswith("momentum_")}
    trained = [one for _, one in named if one.requires_grad]
    resting = [one for _, one in named if not one.requires_grad]
    cast = [one for one in layer.copies.cast() if not is_unread(one) and one.element_size() == 4]
    followed = set(map(id, layer.followed_parameters()))
    rounded = [one for one in cast if one.requires_grad and id(one) not in followed]
    return LayerSize(
        trained=sum(one.numel() for one in trained),
        frozen=sum(one.numel() for one in resting if id(one) not in twins),
        twins=sum(one.numel() for one in resting if id(one) in twins),
        experts=sum(one.numel() for one in trained if id(one) in shares),
        resting_experts=sum(one.numel() for one in resting if id(one) in shares),
        active=round(sum(one.numel() * shares.get(id(one), 1.0) for one in trained)),
        queue=sum(one.nbytes for one in layer.buffers()),
        halved=sum(one.numel() for one in resting if one.element_size() == 2),
        matrices=layer_matrices(layer, moved.intersection(map(id, trained))),
        unread=sum(one.numel() for _, one in named if is_unread(one) and id(one) not in shares),
        unread_experts=sum(one.numel() for _, one in named if is_unread(one) and id(one) in shares),
        cast=sum(one.numel() for one in cast if id(one) not in shares),
        cast_experts=sum(one.numel() for one in cast if id(one) in shares),
        rounded=sum(one.numel() for one in rounded if id(one) not in shares),
        rounded_experts=sum(one.numel() for one in rounded if id(one) in shares),
    )


def _useful(chain: Chain, layout: StepLayout, tokens: int | None) -> float:
    """Operations of a step whose texts all have this number of tokens, or as many as the model reads."""
    if tokens is None:
        return chain_flops(chain, layout)
    listed = num_rows({name: layout.text[name] for name in layout.embedded_texts})
    return chain_flops(chain, layout, tokens * layout.batch_size, tokens * listed)


def _embedding_twice(one: Pass) -> Pass:
    """A pass whose forward pass is made once more, to contrast the whole step. What it gathers is not counted twice."""
    return replace(one, forward=weighted((one.forward, 2.0)), banks=BankWork.mean([(one.banks, 2.0)]))


def _mean(passes: tuple[Pass, ...], weights: list[float]) -> Pass:
    """The mean of one layer's passes over the kinds of batches."""
    numbers = ("joined", "joined_gradient", "joins", "routed", "routed_gradient", "crossing", "crossing_gradient")
    means = {
        name: sum(weight * getattr(one, name) for one, weight in zip(passes, weights, strict=True)) for name in numbers
    }
    return replace(
        passes[0],
        forward=weighted(*((one.forward, weight) for one, weight in zip(passes, weights, strict=True))),
        backward=weighted(*((one.backward, weight) for one, weight in zip(passes, weights, strict=True))),
        banks=BankWork.mean([(one.banks, weight) for one, weight in zip(passes, weights, strict=True)]),
        banks_backward=BankWork.mean(
            [(one.banks_backward, weight) for one, weight in zip(passes, weights, strict=True)]
        ),
        **means,
    )
