"""Scalars of one optimizer step: collected per micro-batch, averaged over micro-batches and replicas."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from omnivl.chain.gather import Gather
from omnivl.chain.state import State

_REPORTED = ("loss", "metric")

Votes = Callable[[], Mapping[str, bool]]
"""What a process says at the end of a step, by the same names on every process, e.g. that it was asked to stop."""


def no_votes() -> Mapping[str, bool]:
    """Nothing is asked."""
    return {}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. All figures are averages over replicas, equal on every replica.

    Attributes:
        loss: The weighted total, averaged over micro-batches.
        losses: Raw losses by objective, averaged over the micro-batches in which the objective was active.
        metrics: Detached metrics by ``objective/name``, averaged likewise.
        gradient_norm: Global norm before clipping.
        learning_rates: By parameter group.
        skipped: True if a loss or gradient was not finite, so that weights, momentum and queue were not updated.
        votes: Of what was asked, that to which any process said yes.
    """

    loss: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    gradient_norm: float
    learning_rates: Mapping[str, float]
    skipped: bool
    votes: frozenset[str] = frozenset()


def scalars(state: State) -> dict[str, Tensor]:
    """The detached scalars at the end of the chain: ``loss``, ``loss/...`` and ``metric/...``."""
    return {name: tensor.detach() for name, tensor in state.under(_REPORTED).items()}


class StepScalars:
    """Collects the scalars of the micro-batches of one step without waiting for the device."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, named: Mapping[str, Tensor]) -> None:
        """Takes the scalars of one micro-batch."""
        for name, tensor in named.items():
            self._values[name].append(tensor.detach().float().reshape(()))

    def means(self) -> tuple[list[str], Tensor]:
        """Names, and the fp32 mean of each over those of this process' micro-batches that had it."""
        names = sorted(self._values, key=lambda name: (len(self._values[name]), name))
        # One mean for all names that as many micro-batches had, instead of one for each.
        together = [list(own) for _, own in groupby(names, lambda name: len(self._values[name]))]
        values = [torch.stack([one for name in own for one in self._values[name]]) for own in together]
        return names, torch.cat([one.view(len(own), -1).mean(1) for one, own in zip(values, together, strict=True)])

    def average(
        self, gather: Gather, norm: Tensor | None = None, votes: Mapping[str, bool] | None = None
    ) -> "StepAverages":
        """Averages over the micro-batches that had the scalar, then over replicas. Called by every replica.

        The names depend on the kinds of the micro-batches only, hence are the same on every replica.

        Args:
            gather: The replicas.
            norm: The gradient's, equal on every replica: read back with the averages, so that the host waits once.
            votes: This replica's, which are counted in the same sum.
        """
        (names, means), asked = self.means(), votes or {}
        said = torch.tensor([float(one) for one in asked.values()], device=means.device)
        averages = gather.total(torch.cat([means, said])) / gather.replicas
        read = torch.cat([averages, norm.reshape(1).to(averages)]).tolist() if norm is not None else averages.tolist()
        return StepAverages(
            dict(sorted(zip(names, read, strict=False))),
            read[-1] if norm is not None else math.nan,
            counted(asked, read[len(names) :]),
        )


def counted(names: Iterable[str], yes: Iterable[float]) -> frozenset[str]:
    """The votes to which some process, or a share of them, said yes."""
    return frozenset(name for name, number in zip(names, yes, strict=False) if number > 0.0)


class StepAverages:
    """Averages of one step.

    Attributes:
        by_name: All of them.
        gradient_norm: What was read back with them, infinite where that was negative, as DeepSpeed says of gradients
            that are not finite; nan where nothing was read back.
        votes: To which any process said yes.
    """

    def __init__(
        self, by_name: Mapping[str, float], gradient_norm: float = math.nan, votes: frozenset[str] = frozenset()
    ) -> None:
        self.by_name, self.votes = dict(by_name), votes
        self.gradient_norm = math.inf if gradient_norm < 0.0 else gradient_norm

    @property
    def are_finite(self) -> bool:
        """Whether the weights may be updated. Sums over replicas: one NaN or infinity makes all of them decide so."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def loss(self) -> float:
        """The weighted total."""
        return self.by_name["loss"]

    @property
    def losses(self) -> dict[str, float]:
        """Raw losses by objective."""
        return self._under("loss/")

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics by ``objective/name``."""
        return self._under("metric/")

    def _under(self, prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in self.by_name.items() if name.startswith(prefix)}
