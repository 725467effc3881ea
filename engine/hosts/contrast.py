"""Contrast of all samples of a step, although a device holds the activations of one micro-batch at a time.

The encoders embed every micro-batch once without keeping anything. The losses that need nothing but embeddings are
computed over all of them, with their gradients. Then each micro-batch is computed as usual, and in place of such a loss
it has one with the gradients that its embeddings have in the loss of the step.

Both passes over a micro-batch draw the same random numbers (dropout, noise of routers).

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from omnivl.chain.chain import Chain
from omnivl.chain.demands import TWIN, Demands
from omnivl.chain.objective import Objective, cached_name
from omnivl.chain.state import State
from omnivl.parts.losses import Losses

Reading = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]
"""A context in which some parameters have their values, under a host that shards them."""


class StepContrast:
    """The losses over all micro-batches of one step.

    Micro-batches of one kind are compared with one another, as those of one kind are in one micro-batch.
    """

    def __init__(self, chain: Chain, reading: Reading = lambda parameters: nullcontext()) -> None:
        """Takes the chain of a host; its last layer computes losses.

        Args:
            chain: The chain.
            reading: See ``Reading``.
        """
        self._losses, self._reading = chain.program[-1], reading
        self.objectives = tuple(one for one in chain.objectives.values() if one.compares_embeddings)

    def twice(
        self, states: Iterable[State], embed: Callable[[State], State], between: Callable[[], None]
    ) -> Iterator[State]:
        """The states of a step, each of which holds what stands in place of the losses.

        While a state is worked on, torch's generators give the numbers that they gave while it was embedded.

        Args:
            states: At the head of the chain.
            embed: Runs the chain up to the embeddings.
            between: Called when all are embedded: drops what layers kept of it.
        """
        states = list(states)
        draws, embedded = Draws(len(states)), []
        for place, state in enumerate(states):
            with torch.no_grad(), draws.of(place):
                embedded.append(self.embedded(embed(state)))
        between()
        for place, own in enumerate(self.cached(embedded)):
            with draws.of(place):
                yield states[place].merged(own)

    def fields(self, state: State) -> frozenset[str]:
        """Names of what the losses read of a state."""
        acting = [one for one in self.objectives if one.key in state.layout.objectives]
        return frozenset[str]().union(*(_read_by(one, state) for one in acting))

    def embedded(self, state: State) -> State:
        """What has to be kept of a state behind the projections."""
        wanted = self.fields(state)
        return State({name: state[name] for name in wanted if dict.__contains__(state, name)}, state.layout)

    def cached(self, embedded: Sequence[State]) -> list[dict[str, Tensor]]:
        """Computes the losses. Called by all replicas with as many micro-batches of equal kinds.

        Args:
            embedded: Of each micro-batch of the step.

        Returns:
            For each micro-batch what its state has to hold in place of the losses; see ``cached_name``.
        """
        assert isinstance(self._losses, Losses), "the last layer computes the losses"
        found: list[dict[str, Tensor]] = [{} for _ in embedded]
        kinds = dict.fromkeys(state.layout.kind for state in embedded)
        for objective in self.objectives:
            for kind in kinds:
                places = [
                    place
                    for place, state in enumerate(embedded)
                    if state.layout.kind == kind and objective.key in state.layout.objectives
                ]
                if places:
                    own = [embedded[place] for place in places]
                    for place, one in zip(places, self._of_kind(objective, own), strict=True):
                        found[place] |= one
        return found

    def _of_kind(self, objective: Objective, states: Sequence[State]) -> list[dict[str, Tensor]]:
        """What one objective gives the micro-batches of one kind."""
        assert isinstance(self._losses, Losses)
        heads, first = self._losses.heads_of(objective.key), states[0]
        sizes = [state.layout.batch_size for state in states]
        joined = _joined(objective, states)
        trained = sorted(_trained_by(objective, first) & joined.keys())
        leaves = {name: joined[name].detach().requires_grad_() for name in trained}
        own = [] if heads.own is None else [one for one in heads.own.named_parameters() if one[1].requires_grad]
        with self._reading([one for _, one in own]), torch.enable_grad():
            made = objective.loss(joined.merged(leaves), heads, self._losses.gather)
            gradients = torch.autograd.grad(made.loss, [*leaves.values(), *(one for _, one in own)], allow_unused=True)
        of_leaves = dict(zip(trained, gradients, strict=False))
        values = {cached_name(objective.key, "loss"): made.loss.detach()}
        values |= {cached_name(objective.key, f"metric/{name}"): value for name, value in made.metrics.items()}
        found = [dict(values) for _ in states]
        for name, gradient in of_leaves.items():
            if gradient is None:
                continue
            # The host averages over micro-batches.
            scaled = gradient * len(states)
            label = cached_name(objective.key, f"of/{name}")
            if _is_by_sample(joined[name], joined):
                for one, part in zip(found, torch.split(scaled, sizes), strict=True):
                    one[label] = part
            else:
                found[0][label] = scaled
        for (name, _), gradient in zip(own, gradients[len(trained) :], strict=True):
            if gradient is not None:
                found[0][cached_name(objective.key, f"head/{name}")] = gradient * len(states)
        return found


def _demands(objective: Objective, state: State) -> Demands:
    demands = objective.demands(state.layout.kind, state.layout.batch_size)
    assert demands is not None, "it acts on the kind"
    return demands


def _read_by(objective: Objective, state: State) -> frozenset[str]:
    """Names of what a loss reads: its fields, the samples' identity, and what was prepared for it."""
    prepared = {name for name in dict.keys(state) if name.startswith(f"{objective.key}/")}
    return _demands(objective, state).reads | {"identity"} | prepared


def _trained_by(objective: Objective, state: State) -> frozenset[str]:
    return frozenset(name for name in _demands(objective, state).reads if not name.startswith(TWIN))


def _is_by_sample(tensor: Tensor, state: State) -> bool:
    return tensor.dim() > 0 and len(tensor) == state.layout.batch_size


def _joined(objective: Objective, states: Sequence[State]) -> State:
    """One state of the samples of all; what is not by sample is equal in all of them."""
    first = states[0]
    tensors = {
        name: torch.cat([state[name] for state in states]) if _is_by_sample(first[name], first) else first[name]
        for name in _read_by(objective, first)
        if name in first
    }
    whole = sum(state.layout.batch_size for state in states)
    return State(tensors, replace(first.layout, batch_size=whole))


class Draws:
    """Random numbers of the micro-batches of a step, which may be drawn twice."""

    def __init__(self, count: int) -> None:
        """Draws a seed for each micro-batch."""
        self._seeds = torch.randint(2**62, (count,)).tolist() if count else []

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """Within the context, torch's generators give the numbers of a micro-batch; after it they go on as before."""
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(self._seeds[place])
            yield
