"""From the micro-batches of a step to the first states of the chain, on the device of the host."""

from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from engine.hosts.sending import sent
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Objective, weigh_terms
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind


class PlanLayout(Protocol):
    """Which passes a step makes: ``omnivl.chain.layout.plan_layout`` with the stage's objectives bound to it."""

    def __call__(self, kind: DataKind, batch_size: int, num_frames: int, entry: str) -> StepLayout:
        """The layout of a micro-batch of ``batch_size`` samples of an entry, with ``num_frames`` frames each."""


class LayoutKey(NamedTuple):
    """The properties of a micro-batch that determine its layout: the arguments of ``PlanLayout``."""

    kind: DataKind
    batch_size: int
    num_frames: int
    entry: str

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """The key of a micro-batch."""
        return cls(batch.kind, batch.size, batch.num_frames, batch.entry)


def first_state(batch: Batch, plan_layout: PlanLayout, device: torch.device, *, chain: Chain | None = None) -> State:
    """The state at the head of the chain for one micro-batch, its tensors on ``device``.

    Args:
        batch: The micro-batch.
        plan_layout: Layout of a micro-batch.
        device: Where the chain runs.
        chain: Says which positions of the texts it computes; without one it computes all.
    """
    state = State.from_batch(batch, plan_layout(*LayoutKey.of(batch)))
    return _moved(state if chain is None else state.merged(_kept_positions(chain, state)), device)


def _moved(state: State, device: torch.device) -> State:
    return State(dict(zip(state, sent(list(state.values()), device), strict=True)), state.layout)


def first_states(
    batches: Sequence[Batch],
    plan_layout: PlanLayout,
    device: torch.device,
    chain: Chain,
    gather: Gather,
) -> Iterator[State]:
    """The states at the head of the chain for the micro-batches of a step, made one by one as they are asked for.

    Each has ``term_weight/{name}`` for the ``terms`` of the objectives that act on it: a host that averages over
    micro-batches and replicas then has the gradient of the joined batch, however many tokens, patches or pairs a
    micro-batch holds.

    Called by all replicas of ``gather``, which sum up their counts once in a step.

    Args:
        batches: This replica's micro-batches; entries, kinds and sizes are equal on every replica.
        plan_layout: Layout of a micro-batch.
        device: Where the chain runs.
        chain: Its objectives count terms, its layers say which positions they compute.
        gather: The replicas that see different samples.
    """
    whole = [State.from_batch(batch, plan_layout(*LayoutKey.of(batch))) for batch in batches]
    whole = [state.merged(_kept_positions(chain, state)) for state in whole]
    # All but the pixels is small, so that it is moved once and waits on the device for its turn.
    small = deque(_moved(state.updated(drop=("frames", "second_view")), device) for state in whole)
    for state, own in zip(whole, _term_weights(small, chain.objectives, gather), strict=True):
        there = small.popleft()
        large = {name: one for name, one in state.items() if name not in there}
        moved = {**there, **dict(zip(large, sent(list(large.values()), device), strict=True))}
        yield State({name: moved[name] for name in state}, state.layout).merged(own)


def _kept_positions(chain: Chain, state: State) -> dict[str, Tensor]:
    return {
        name: kept
        for layer in chain.layers
        if layer.drops_padding
        for name, kept in layer.kept_positions(state).items()
    }


@torch.no_grad()
def _term_weights(
    states: Collection[State], objectives: Mapping[str, Objective], gather: Gather
) -> list[dict[str, Tensor]]:
    """Of each micro-batch, given without its frames, ``term_weight/{name}``, fp32 scalars.

    An objective's loss is averaged over all micro-batches, those included on which it does not act: its share of the
    step is that of the micro-batches on which it does, within which each of its terms weighs the same.
    """
    found: list[dict[str, Tensor]] = []
    counts: dict[str, list[Tensor]] = defaultdict(list)
    for state in states:
        own = {
            name: count
            for key in state.layout.objectives
            for name, count in objectives[key].terms(state, gather).items()
        }
        for name, count in own.items():
            counts[name].append(count.to(torch.float32))
        found.append(own)
    if not counts:
        return [{} for _ in states]
    joined = gather.total(torch.stack([torch.stack(each).sum() for each in counts.values()]))
    weights = {
        f"term_weight/{name}": weigh_terms(total, gather.replicas * len(each))
        for (name, each), total in zip(counts.items(), joined, strict=True)
    }
    return [{f"term_weight/{name}": weights[f"term_weight/{name}"] for name in own} for own in found]
