"""Means of losses and metrics over the steps between two lines of metrics."""

from collections.abc import Mapping
from typing import Any

from engine.step.report import StepResult


class LossWindow:
    """Sums of finite steps. Its state goes into checkpoints, so that a resumed run writes the same lines."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Starts empty, or from what ``state`` returned."""
        self._sums: dict[str, dict[str, list[float]]] = {}
        for group, sums in (state or {}).items():
            self._sums[group] = {name: [float(total), int(count)] for name, (total, count) in sums.items()}

    def state(self) -> dict[str, Any]:
        """Plain containers; floats survive JSON exactly."""
        return {group: {name: list(pair) for name, pair in sums.items()} for group, sums in self._sums.items()}

    def add(self, result: StepResult) -> None:
        """Adds one step. Skipped steps are left out."""
        if result.skipped:
            return
        figures: Mapping[str, Mapping[str, float]] = {
            "total": {"loss": result.loss, "gradient_norm": result.gradient_norm},
            "losses": result.losses,
            "metrics": result.metrics,
        }
        for group, values in figures.items():
            sums = self._sums.setdefault(group, {})
            for name, value in values.items():
                pair = sums.setdefault(name, [0.0, 0])
                pair[0] += value
                pair[1] += 1

    def take(self) -> dict[str, Any]:
        """Returns the means as groups of a record and starts over."""
        means = {
            group: {name: total / count for name, (total, count) in sorted(sums.items())}
            for group, sums in self._sums.items()
        }
        self._sums = {}
        return {**means.pop("total", {}), **means}
