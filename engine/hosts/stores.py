"""Where a host keeps a parameter and its optimizer moments, and how to read and write them whole.

A ``Store`` hides what ZeRO cuts. What is cut beside it, banks of experts, is ``engine.hosts.holdings``' business.

Shapes: n elements of a parameter, of which a replica may hold a run.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.whole import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square, by the names that torch gives them."""


class Store(Protocol):
    """What a host holds. Reading is done by every replica of a parameter, in the same order."""

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, fp32."""

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Takes over the whole parameter, or this replica's share of it."""

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The whole moment of ``MOMENTS``; only where ``steps`` is not 0."""

    def set_moment(self, parameter: nn.Parameter, name: str, whole: Tensor) -> None:
        """Takes it over; after ``begin``."""

    def steps(self) -> int:
        """Steps that the optimizer took; 0 where it has no moments yet."""

    def begin(self, steps: int) -> None:
        """Makes room for moments, and sets the steps that the optimizer took."""

    def finish(self) -> None:
        """To be called once after the last parameter was set."""


class WholeStore:
    """Every replica holds everything: the plain host, and ZeRO 0."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Works on the optimizer's own state."""
        self._optimizer = optimizer

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter."""
        return parameter.detach()

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copies it."""
        parameter.detach().copy_(whole)

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The optimizer's tensor."""
        found: Tensor = self._optimizer.state[parameter][name]
        return found

    def set_moment(self, parameter: nn.Parameter, name: str, whole: Tensor) -> None:
        """Copies it."""
        self._optimizer.state[parameter][name].copy_(whole)

    def steps(self) -> int:
        """As the optimizer counts."""
        return _steps_of(self._optimizer)

    def begin(self, steps: int) -> None:
        """Makes state for every parameter of the optimizer."""
        _begin(self._optimizer, (one for group in self._optimizer.param_groups for one in group["params"]), steps)

    def finish(self) -> None:
        """Nothing is kept twice."""


@dataclass(frozen=True)
class _Share:
    """A run of a parameter that this replica holds within a flat tensor of the optimizer.

    Attributes:
        flat: The flat tensor, the optimizer's parameter.
        offset: Where the run begins in it.
        start: Where it begins in the parameter.
        count: Its length.
    """

    flat: Tensor
    offset: int
    start: int
    count: int


class ZeroStore:
    """ZeRO 1 to 3: moments are cut over the replicas of a parameter, with stage 3 the parameter too."""

    def __init__(self, engine: Any, stage: int) -> None:
        """Works on DeepSpeed's own tensors.

        Args:
            engine: A ``DeepSpeedEngine``.
            stage: 1, 2 or 3.
        """
        self._zero, self._stage = engine.optimizer, stage
        self._adamw: torch.optim.Optimizer = engine.optimizer.optimizer

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter, which with stage 3 is joined of all partitions."""
        if self._stage < 3:
            return parameter.detach()
        partition, start = self._partition(parameter)
        return self._joined(parameter, start, partition)

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Copies the parameter or this replica's partition of it. The optimizer's own copy follows in ``finish``."""
        if self._stage < 3:
            parameter.detach().copy_(whole)
        else:
            partition, start = self._partition(parameter)
            partition.copy_(whole.flatten()[start : start + len(partition)])

    def moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Joined of all shares."""
        share = self._share(parameter)
        if share is None:
            return self._joined(parameter, 0, None)
        return self._joined(parameter, share.start, self._held(share, name))

    def set_moment(self, parameter: nn.Parameter, name: str, whole: Tensor) -> None:
        """Copies this replica's share."""
        if (share := self._share(parameter)) is not None:
            self._held(share, name).copy_(whole.flatten()[share.start : share.start + share.count])

    def steps(self) -> int:
        """As the optimizer counts: it steps all flat tensors together."""
        return _steps_of(self._adamw)

    def begin(self, steps: int) -> None:
        """Makes state for every flat tensor."""
        _begin(self._adamw, self._flats(), steps)

    def finish(self) -> None:
        """Makes the optimizer's own copy of the parameters follow them."""
        self._zero.refresh_fp32_params()

    def _flats(self) -> list[Tensor]:
        flats = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        found: list[Tensor] = getattr(self._zero, flats)
        return found

    def _partition(self, parameter: Any) -> tuple[Tensor, int]:
        """What this replica holds of a parameter under stage 3, without what fills it up, and where that begins."""
        held: Tensor = parameter.ds_tensor.data.flatten()
        start = held.numel() * dist.get_rank(_group_of(parameter))
        return held[: max(0, min(held.numel(), parameter.ds_numel - start))], start

    def _share(self, parameter: Any) -> _Share | None:
        """Where the optimizer keeps a trained parameter; None where this replica has nothing of it."""
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            held, start = self._partition(parameter)
            return _Share(self._flats()[group], offset, start, held.numel())
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Share(self._flats()[mapping.param_group_index], here.start, there.start, there.numel)

    def _held(self, share: _Share, name: str) -> Tensor:
        state: Tensor = self._adamw.state[share.flat][name]
        return state[share.offset : share.offset + share.count]

    def _joined(self, parameter: Any, start: int, held: Tensor | None) -> Tensor:
        """Adds up what the replicas hold, each in its place: exact, since all else is zero."""
        shape = whole_shape(parameter)
        whole = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=parameter.device)
        if held is not None:
            whole[start : start + len(held)] = held
        dist.all_reduce(whole, group=_group_of(parameter))
        return whole.view(shape)


def _group_of(parameter: Any) -> dist.ProcessGroup:
    """The replicas over which ZeRO cuts a parameter."""
    group: dist.ProcessGroup = getattr(parameter, "ds_process_group", None) or parameter._dp_group
    return group


def _steps_of(optimizer: torch.optim.Optimizer) -> int:
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


def _begin(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], steps: int) -> None:
    for tensor in tensors:
        state = optimizer.state[tensor]
        # A fused AdamW counts on the device of its parameter.
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
