"""Where a host keeps a parameter and its optimizer moments.

A ``Store`` hides how ZeRO shards a parameter. ``engine.hosts.holdings`` handles split banks of experts.

Shapes: n elements of a parameter, of which a replica may hold a run.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.hosts.zero.flats import FlatGathers
from engine.step.muon import MatrixSteps, Placed, matrices_in, moved_together
from engine.step.optimizer import MOMENTS, MUON_MOMENTS, ChainOptimizer, ParameterGroup
from omnivl.chain.chain import Chain

WEIGHT = "weight"


@dataclass(frozen=True)
class Run:
    """A run of a parameter, flattened, that this replica holds.

    Attributes:
        held: [n], a view of the host's memory: copying into it changes the host's tensor.
        start: Where it begins in the parameter, as this process has it before ZeRO shards it.
    """

    held: Tensor
    start: int


class Store(Protocol):
    """A host's parts of its parameters, and of their moments if ``steps`` is not 0."""

    def run(self, parameter: nn.Parameter, field: str) -> Run:
        """This replica's run of the parameter (``WEIGHT``) or of one of its moments, fp32."""

    def group(self, parameter: nn.Parameter, field: str) -> dist.ProcessGroup | None:
        """The replicas over which it is sharded; None if each of them holds the whole."""

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The names of its moments."""

    def steps(self) -> int:
        """Steps that the optimizer took; 0 where it has no moments yet."""

    def begin(self, steps: int) -> None:
        """Allocates moments, and sets the number of steps that the optimizer took."""

    def make_exact(self) -> None:
        """Has every replica hold the exact values of what it holds whole. Called by every replica."""

    def finish(self) -> None:
        """To be called once after the last run was written into."""


class WholeStore:
    """Every replica holds everything: the plain host, and ZeRO 0."""

    def __init__(
        self,
        optimizer: ChainOptimizer,
        groups: Sequence[ParameterGroup],
        chain: Chain,
        device: torch.device,
        *,
        replicas: dist.ProcessGroup | None,
        experts: dist.ProcessGroup | None = None,
    ) -> None:
        """Works on the optimizer's own state, and tells it where matrices lie. Called by every replica.

        Args:
            optimizer: Its tensors are those of the groups that this process trains.
            groups: From ``parameter_groups``.
            chain: Whose parameters they are.
            device: Where it is.
            replicas: Those that hold the same parameters; None where there is only this one.
            experts: Those that hold the same experts, where experts are split; None where there is only this one.
        """
        self._optimizer = optimizer
        stacked = matrices_in(chain)
        moved = {id(tensor) for entry in optimizer.param_groups for tensor in entry["params"]}
        for group in groups:
            if (options := group.muon) is None:
                continue
            # What another process trains, as the stages of a pipeline do, has moments of the same names.
            shared = (experts if group.apart else replicas) if id(group.parameters[0]) in moved else None
            for parameters in _together(group.parameters, 1 if shared is None else dist.get_world_size(shared)):
                ends = itertools.accumulate(one.numel() for one in parameters)
                placed = [Placed(end - one.numel(), 0, one.numel()) for one, end in zip(parameters, ends, strict=True)]
                steps = MatrixSteps(parameters, placed, stacked, options, group=shared, device=device, repeated=True)
                optimizer.matrix_steps.update((id(one), steps) for one in parameters)

    def run(self, parameter: nn.Parameter, field: str) -> Run:
        """The parameter, or the optimizer's tensor."""
        whole = parameter.detach() if field == WEIGHT else self._optimizer.state[parameter][field]
        return Run(whole.view(-1), 0)

    def group(self, parameter: nn.Parameter, field: str) -> dist.ProcessGroup | None:
        """Nothing is sharded."""
        return None

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """As the optimizer has them."""
        return self._optimizer.moment_names(parameter)

    def steps(self) -> int:
        """As the optimizer counts."""
        return _steps_of(self._optimizer)

    def begin(self, steps: int) -> None:
        """Makes state for every parameter of the optimizer."""
        _begin(self._optimizer, (one for group in self._optimizer.param_groups for one in group["params"]), steps)

    def make_exact(self) -> None:
        """It does."""

    def finish(self) -> None:
        """Nothing is kept twice."""


class ZeroStore:
    """ZeRO 1 to 3: moments are sharded over the replicas of a parameter, under ZeRO-3 the parameter too."""

    def __init__(
        self,
        engine: Any,
        stage: int,
        groups: Sequence[ParameterGroup],
        chain: Chain,
        device: torch.device,
        gathers: FlatGathers | None = None,
    ) -> None:
        """Works on DeepSpeed's own tensors, and tells the optimizer where matrices lie. Called by every replica.

        Args:
            engine: A ``DeepSpeedEngine`` around a ``ChainOptimizer``.
            stage: ZeRO stage, 1, 2 or 3.
            groups: From ``parameter_groups``.
            chain: Whose parameters they are.
            device: Where it is.
            gathers: Which may round parameters; None: DeepSpeed's own, which do not.
        """
        self._zero, self._stage, self._gathers = engine.optimizer, stage, gathers
        self._optimizer: ChainOptimizer = engine.optimizer.optimizer
        options = {id(one): group.muon for group in groups if group.muon for one in group.parameters}
        self._matrices = frozenset(options)
        stacked = matrices_in(chain)
        for flat, parameters in zip(self._flats(), self._members(), strict=True):
            if (moved := options.get(id(parameters[0]))) is not None:
                own = [self._place(one)[1] for one in parameters]
                shared = self.group(parameters[0], MOMENTS[0])
                self._optimizer.matrix_steps[id(flat)] = MatrixSteps(
                    parameters, own, stacked, moved, group=shared, device=device
                )

    def run(self, parameter: nn.Parameter, field: str) -> Run:
        """A view of the parameter or its partition, or of a flat tensor of the optimizer's."""
        if field != WEIGHT:
            return self._moment(parameter, field)
        if self._is_rounded(parameter):
            return self._part(parameter, lambda flat: flat.detach())
        return Run(parameter.detach().view(-1), 0) if self._stage < 3 else self._partition(parameter)

    def group(self, parameter: Any, field: str) -> dist.ProcessGroup | None:
        """The replicas of the parameter; None for weights below ZeRO-3, unless their exact values are sharded."""
        if field == WEIGHT and self._stage < 3 and not self._is_rounded(parameter):
            return None
        group: dist.ProcessGroup = getattr(parameter, "ds_process_group", None) or parameter._dp_group
        return group

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """As the optimizer has those of the flat tensor in which the parameter lies."""
        return MUON_MOMENTS if id(parameter) in self._matrices else MOMENTS

    def steps(self) -> int:
        """The optimizer's count; it is the same for all flat tensors."""
        return _steps_of(self._optimizer)

    def begin(self, steps: int) -> None:
        """Makes state for every flat tensor."""
        _begin(self._optimizer, self._flats(), steps)

    def make_exact(self) -> None:
        """Gathers what was rounded when it was gathered."""
        if self._gathers is not None:
            self._gathers.make_exact()

    def finish(self) -> None:
        """Copies the parameters, which have to be exact, into the optimizer's own copy of them."""
        self._zero.refresh_fp32_params()

    def _flats(self) -> list[Tensor]:
        flats = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        found: list[Tensor] = getattr(self._zero, flats)
        return found

    def _partition(self, parameter: Any) -> Run:
        """This replica's part of a parameter under ZeRO-3, without padding."""
        held: Tensor = parameter.ds_tensor.data.view(-1)
        start = held.numel() * dist.get_rank(self.group(parameter, WEIGHT))
        return Run(held[: max(0, min(held.numel(), parameter.ds_numel - start))], start)

    def _members(self) -> list[list[nn.Parameter]]:
        """The parameters in each flat tensor, in the same order on every replica."""
        found: list[list[nn.Parameter]] = getattr(self._zero, "fp16_groups" if self._stage == 3 else "bit16_groups")
        return found

    def _is_rounded(self, parameter: nn.Parameter) -> bool:
        return self._gathers is not None and self._gathers.is_rounded(parameter)

    def _moment(self, parameter: Any, name: str) -> Run:
        return self._part(parameter, lambda flat: self._optimizer.state[flat][name])

    def _part(self, parameter: Any, values: Callable[[Tensor], Tensor]) -> Run:
        """This replica's part of a parameter, in what a flat tensor has as ``values``."""
        group, placed = self._place(parameter)
        found = values(self._flats()[group])
        return Run(found[placed.offset : placed.offset + placed.count], placed.start)

    def _place(self, parameter: Any) -> tuple[int, Placed]:
        """In which flat tensor this replica's part of a parameter lies, and where."""
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            partition = self._partition(parameter)
            start, count = partition.start, partition.held.numel()
        elif (mapping := parameter._hp_mapping) is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            group, offset, start, count = mapping.param_group_index, here.start, there.start, there.numel
        else:  # this replica has nothing of it
            group, offset, start, count = 0, 0, 0, 0
        return group, Placed(offset, start, count)


def _together(parameters: Sequence[nn.Parameter], replicas: int) -> list[list[nn.Parameter]]:
    """Parameters in their order, in bundles that are moved together."""
    bundles: list[list[nn.Parameter]] = []
    left = 0
    for parameter in parameters:
        if parameter.numel() > left:
            bundles.append([])
            left = moved_together(replicas)
        bundles[-1].append(parameter)
        left -= parameter.numel()
    return bundles


def _steps_of(optimizer: torch.optim.Optimizer) -> int:
    return next((int(state["step"]) for state in optimizer.state.values() if "step" in state), 0)


def _begin(optimizer: ChainOptimizer, tensors: Iterable[Tensor], steps: int) -> None:
    for tensor in tensors:
        state = optimizer.state[tensor]
        # A fused AdamW counts on the device of its parameter.
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)
        for name in optimizer.moment_names(tensor):
            if name not in state:
                state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
