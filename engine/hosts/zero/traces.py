"""ZeRO-3 notes in which order layers use their parameters, and gathers ahead by it, kind by kind.

DeepSpeed keeps one. A micro-batch of another kind, in which other layers have a backward pass, makes it forget that
order, gather without looking ahead, and compare a new one among all ranks, number by number.

Source: DeepSpeed 0.19, ``runtime/zero/partitioned_param_coordinator.py``.
"""

from collections.abc import Hashable
from typing import Any

_CLASS = "_PartitionedParameterCoordinator__"
_KEPT = (f"{_CLASS}trace_mode", f"{_CLASS}submodule_order", f"{_CLASS}param_order")


class Traces:
    """The orders of one engine, by kind of micro-batch."""

    def __init__(self, engine: Any) -> None:
        """Takes over from an engine of stage 3."""
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self._reset = self._coordinator.reset_step
        self._fresh = getattr(self._coordinator, _KEPT[0])
        self._orders: dict[Hashable, dict[str, Any]] = {}
        self._current: Hashable = None
        self._next: Hashable = None
        self._coordinator.reset_step = self._begin

    def expect(self, kind: Hashable) -> None:
        """Says of what kind the next micro-batch is."""
        self._next = kind

    def _begin(self) -> None:
        """Called before each forward pass: ends the order of the last one."""
        self._reset()
        if self._next == self._current:
            return
        if self._coordinator.is_complete_trace():
            self._orders[self._current] = {name: getattr(self._coordinator, name) for name in _KEPT}
        else:  # an evaluation, which uses other layers, has made DeepSpeed forget it
            self._orders.pop(self._current, None)
        self._coordinator._clear_trace_structures()
        for name, value in self._orders.get(self._next, {_KEPT[0]: self._fresh}).items():
            setattr(self._coordinator, name, value)
        self._current = self._next
        self._reset()
