"""Comparing given weights with those of the chain."""

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from engine.errors import CheckpointError
from engine.hosts.base import WeightsReport
from engine.processes import messages
from omnivl.chain.gather import Gather


def agree_on_weights(
    own: Mapping[str, Sequence[int]],
    weights: Mapping[str, Tensor] | None,
    *,
    strict: bool,
    gather: Gather,
    group: dist.ProcessGroup | None = None,
) -> WeightsReport:
    """Matches the weights of replica 0 with the chain and tells every replica the result. Called by every replica.

    Args:
        own: Shapes of the chain's parameters and buffers by name.
        weights: The weights to be copied; read on replica 0 only.
        strict: Refuse missing and unexpected names.
        gather: The replicas.
        group: Their process group.

    Raises:
        CheckpointError: As ``match_weights``, on every replica: if only one raised, the others would wait for it.
    """
    report: WeightsReport | None = None
    problem: str | None = None
    if gather.replica == 0:
        assert weights is not None, "replica 0 hands in the weights"
        try:
            report = match_weights(own, {name: tuple(t.shape) for name, t in weights.items()}, strict=strict)
        except CheckpointError as error:
            problem = str(error)
    if gather.replicas > 1:
        kind = tuple[WeightsReport | None, str | None]
        report, problem = messages.broadcast((report, problem), kind, group)
    if report is None:
        raise CheckpointError(problem or "")
    return report


def match_weights(
    own: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]], *, strict: bool
) -> WeightsReport:
    """Sorts names into matched, missing and unexpected.

    Args:
        own: Shapes of the chain's parameters and buffers by name.
        given: Shapes of the weights that are to be copied in.
        strict: Refuse missing and unexpected names.

    Raises:
        CheckpointError: A shape differs, or a name is missing or unexpected under ``strict``.
    """
    report = WeightsReport(
        matched=tuple(name for name in own if name in given),
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
    )
    reshaped = [name for name in report.matched if tuple(own[name]) != tuple(given[name])]
    if reshaped:
        name = reshaped[0]
        raise CheckpointError(
            f"weights: {name} has shape {list(given[name])}, the model has {list(own[name])}"
            f" ({len(reshaped)} such weights); build the model with the sizes that the weights were trained with"
        )
    if strict and (report.missing or report.unexpected):
        raise CheckpointError(
            f"weights: missing {_shorten(report.missing)}; unexpected {_shorten(report.unexpected)};"
            " allowed are exactly the model's own names: load without strict to keep what is missing"
        )
    return report


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
