"""One optimizer step of a stage as activities of a simulator: on the device of a process, on its links, in their order.

Replicas do the same at the same time, so one process is simulated for all of them, in a pipeline one process of each
pipeline stage; "stage" below means this process. The time of a collective is that of all its members. Every process has
two resources, ``compute`` and ``link``; communication that does not overlap occupies ``compute``.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from engine.estimate.events import Activity, Network
from engine.estimate.matrices import (
    COPIED_BYTES,
    COPIED_BYTES_SHARDED,
    MOVED_BYTES,
    matrices_of,
    muon_operations,
    worked_on,
)
from engine.estimate.memory import stay_gathered
from engine.estimate.operations import Operations
from engine.estimate.traffic import Cluster, Group, Transfer, all_gather, all_reduce, all_to_all, reduce_scatter, send
from engine.estimate.work import LayerSize, ModelWork, Pass
from engine.hosts.pipeline.division import Division
from engine.plan.plan import StagePlan

Collective = Callable[[float, Group], Transfer]

COMPUTE, OPTIMIZER, OFFLOAD = "forward and backward", "optimizer", "offload"
REDUCE, GATHER, JOIN = "gradient reduction", "weight gather", "contrastive gather"
EXPERTS, BOUNDARY, BUBBLE = "expert all-to-all", "pipeline boundary", "pipeline bubble"
TIED, MATRICES = "copies of layers", "exchange of matrices"

_ADAM, _NORM, _TWIN, _ADD, _AVERAGE, _CAST = 28, 12, 12, 12, 16, 6
"""Bytes read and written per element: by AdamW, which reads four numbers and writes three; by norm and clipping; by a
twin's step; by the gradients of each further micro-batch; by the plain host's copy into one buffer and its division; by
a gradient's cast to bf16 or back to fp32."""


@dataclass(frozen=True)
class Copies:
    """Bytes per element that a host copies for its collectives and its optimizer.

    One part is independent of the number of processes, the other one is proportional to a process' share.

    Attributes:
        reduced: For trained parameters in a reduction: copied into the bucket, flattened, divided.
        reduced_share: For the share in a reduction.
        gathered: For gathered parameters: assembled, and split into parameters.
        gathered_share: For the share in a gather.
        stepped_share: For the share in the optimizer: flattened, cast, zeroed, copied back.
        added_share: For the share, in each micro-batch after the first.
    """

    reduced: float = 0.0
    reduced_share: float = 0.0
    gathered: float = 0.0
    gathered_share: float = 0.0
    stepped_share: float = 0.0
    added_share: float = 0.0


COPIES: Mapping[int, Copies] = {
    0: Copies(),
    1: Copies(reduced=16.0, reduced_share=12.0, stepped_share=12.0),
    2: Copies(reduced=23.0, reduced_share=16.0, stepped_share=20.0, added_share=12.0),
    3: Copies(reduced=24.0, reduced_share=24.0, gathered=8.0, gathered_share=8.0, stepped_share=39.0, added_share=12.0),
}
"""By ZeRO stage: counted in steps under ``OperationCounter`` on two and four processes."""

_ROUND, _ROUND_OWN = 10, 8
"""Bytes that are copied per element that ZeRO 1 and 2 gather in two bytes: spread over the parts of all replicas, and
of the share before that. Counted likewise."""

COLLECTIVE_MULTIPROCESSORS = 16
"""That a collective occupies on an accelerator while it works beside the computation. Source: NVIDIA, "Enabling Fast
Inference and Resilient Training with NCCL 2.27": 16 or more without SHARP [recalled]."""


@dataclass
class StepActivities:
    """Activities of one step, and the number of micro-batches that they represent.

    Attributes:
        activities: In the order in which processes submit them.
        traffic: By stage and cause.
        micro_batches: Number of simulated micro-batches.
        wanted: Number of micro-batches of the real step. Without a pipeline they run one after the other, and no more
            than two are simulated.
        shorter: Activities of a step of one micro-batch, where not all are simulated.
    """

    activities: list[Activity] = field(default_factory=list)
    traffic: dict[int, dict[str, Transfer]] = field(default_factory=lambda: defaultdict(dict))
    micro_batches: int = 1
    wanted: int = 1
    shorter: "StepActivities | None" = None

    def add(self, resource: str, seconds: float, after: Sequence[int], cause: str) -> int:
        """Adds an activity and returns its index."""
        self.activities.append(Activity(resource, seconds, tuple(after), cause))
        return len(self.activities) - 1

    @cached_property
    def network(self) -> Network:
        """The activities with their dependencies, once all are added."""
        return Network(self.activities)

    def seconds(self, stretch: Mapping[str, float] | None = None, without: str | None = None) -> float:
        """Of the whole step.

        Args:
            stretch: See ``Network.timeline``.
            without: A cause whose activities are to take no time.
        """
        whole = self.network.timeline(stretch, without).seconds
        if self.shorter is None:
            return whole
        more = whole - self.shorter.seconds(stretch, without)
        return whole + (self.wanted - self.micro_batches) * more


def zero_stage(stage: StagePlan) -> int:
    """What ZeRO shards; nothing under the plain host."""
    return 0 if stage.parallel.host == "plain" else stage.parallel.zero_stage


class StepBuilder:
    """Submits the activities of every simulated process."""

    def __init__(
        self,
        stage: StagePlan,
        work: ModelWork,
        cluster: Cluster,
        expert_parallel: int,
        division: Division,
        copies: Copies | None = None,
    ) -> None:
        self.stage, self.work, self.cluster, self.hardware = stage, work, cluster, cluster.hardware
        self.division, self.stages = division, len(division.cuts)
        self.replicas = cluster.processes // self.stages
        self.experts, self.zero = expert_parallel, zero_stage(stage)
        # Alone, and for an offloaded optimizer, stage 1 reduces as DeepSpeed does, like stage 2.
        scatters = self.zero == 1 and self.replicas > 1 and stage.parallel.offload == "none"
        self.scatters = self.zero == 3 or scatters
        self.copied = COPIES[self.zero if self.scatters else 2 * (self.zero > 0)] if copies is None else copies
        self.passes = [[work.passes[place] for place in part] for part in division.cuts]
        self.sizes = [[work.layers[name] for name in division.owned(number)] for number in range(self.stages)]
        self.copies = [[work.layers[name] for name in division.copied(number)] for number in range(self.stages)]
        self.kept = {
            name
            for name, stays in zip(work.layers, stay_gathered(list(work.layers.values()), work.zero.reuse), strict=True)
            if stays
        }
        self.built = StepActivities()
        self._seconds: dict[int, float] = {}  # by the operations of a pass, which ``work`` keeps

    @property
    def data(self) -> Group:
        """The replicas of a stage."""
        return self.cluster.group(self.replicas)

    def whole(self, micro_batches: int) -> StepActivities:
        """A step without a pipeline."""
        self.built.micro_batches = self.built.wanted = micro_batches
        last: tuple[int, ...] = ()
        loose: list[int] = []
        for number in range(micro_batches):
            last, reduced = self._backward(0, self._forward(0, last))
            last = self._accumulate(0, number, last)
            loose += reduced
        self._finish(0, (*last, *loose))
        return self.built

    def pipeline(self, micro_batches: int) -> StepActivities:
        """A step with DeepSpeed's one-forward-one-backward schedule."""
        self.built.micro_batches = self.built.wanted = micro_batches
        stages = self.stages
        done: dict[tuple[str, int, int], int] = {}
        last: dict[int, tuple[int, ...]] = dict.fromkeys(range(stages), ())
        order = {stage: one_forward_one_backward(stage, stages, micro_batches) for stage in range(stages)}
        while any(order.values()):
            for stage in range(stages):
                if not order[stage]:
                    continue
                kind, number = order[stage][0]
                source = stage - 1 if kind == "forward" else stage + 1
                if 0 <= source < stages and (kind, source, number) not in done:
                    continue
                order[stage].pop(0)
                arrived = (done[kind, source, number],) if 0 <= source < stages else ()
                if kind == "forward":
                    last[stage] = self._forward(stage, (*last[stage], *arrived))
                else:
                    last[stage], _ = self._backward(stage, (*last[stage], *arrived))
                    last[stage] = self._accumulate(stage, number, last[stage])
                done[kind, stage, number] = self._cross(stage, kind, last[stage])
        last = self._tie(last)
        for stage in range(stages):
            last[stage] = self._finish(stage, last[stage])
        self._tie(last)
        return self.built

    def _tie(self, last: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """Sends gradients of copies to the owners of their layers, or weights back: layer by layer, both ends wait."""
        last = dict(last)
        for name in self.division.tied:
            owner = self.division.owners[name]
            for other in (stage for stage in self.division.stages_of[name] if stage != owner):
                within = self.cluster.is_within(owner * self.replicas, other * self.replicas)
                transfer = send(4.0 * self._held(self.work.layers[name]), within=within)
                after = *last[owner], *last[other]
                for stage in (owner, other):
                    last[stage] = (self._transfer(stage, transfer, after, TIED),)
        return last

    def _cross(self, stage: int, kind: str, after: tuple[int, ...]) -> int:
        """Sends what the next stage of this direction needs."""
        target = stage + 1 if kind == "forward" else stage - 1
        if not 0 <= target < self.stages:
            return after[-1]
        border = self.passes[stage if kind == "forward" else target][-1]
        size = border.crossing if kind == "forward" else border.crossing_gradient
        within = self.cluster.is_within(stage * self.replicas, target * self.replicas)
        return self._transfer(stage, send(size, within=within), after, BOUNDARY, waits=False)

    def _forward(self, stage: int, after: tuple[int, ...]) -> tuple[int, ...]:
        last, computed = after, [after, after]
        for one in self.passes[stage]:
            last = (*last, *self._gather(stage, one, computed[-2]))
            if one.joins:
                joined = all_gather(one.joined * self.replicas, self.data)
                joined = replace(joined, within_messages=joined.within_messages * one.joins)
                last = (self._transfer(stage, joined, last, JOIN),)
            last = self._trade(stage, one, one.routed, last)
            last = (self._compute(stage, one.forward, last),)
            computed.append(last)
        return last

    def _backward(self, stage: int, after: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
        last, computed, loose = after, [after, after], list[int]()
        firsts = {one.layer: number for number, one in reversed(list(enumerate(self.passes[stage])))}
        for number, one in reversed(list(enumerate(self.passes[stage]))):
            if one.layer not in self.kept:
                last = (*last, *self._gather(stage, one, computed[-2]))
            last = (self._compute(stage, one.backward, last),)
            if one.joined_gradient:
                last = (self._transfer(stage, all_reduce(one.joined_gradient, self.data), last, JOIN),)
            last = self._trade(stage, one, one.routed_gradient, last)
            computed.append(last)
            size = self.work.layers[one.layer]
            if firsts[one.layer] != number or not size.trained:
                continue  # a layer that is passed twice: its gradients are complete after the first pass' backward
            if self.zero == 3:
                loose.append(self._reduce(stage, [size], last, waits=not self._overlaps))
            elif self.zero == 2:
                last = (self._reduce(stage, [size], last),)
        return last, loose

    def _accumulate(self, stage: int, number: int, after: tuple[int, ...]) -> tuple[int, ...]:
        """Adds the gradients of a micro-batch to those before it."""
        if number == 0:
            return after
        sizes = (*self.sizes[stage], *self.copies[stage])
        if self.zero < 2:
            moved = _ADD * sum(self._held(size) for size in sizes)
        else:  # of experts a process has its part, shared with the processes that hold the same
            moved = self.copied.added_share * sum(size.trained for size in sizes) / self.replicas
        return (self._add(stage, "compute", self.hardware.copy_seconds(moved), after, COMPUTE),)

    def _finish(self, stage: int, after: tuple[int, ...]) -> tuple[int, ...]:
        """Reduces the gradients that are not reduced yet, runs the optimizer, and sends the weights to all replicas."""
        sizes, hardware = self.sizes[stage], self.hardware
        if self.zero < 2:
            after = (self._reduce(stage, sizes, after),)
        trained = sum(size.trained for size in sizes)
        twins = sum(size.twins for size in (*sizes, *self.copies[stage]))
        local = sum(self._held(size) for size in sizes)
        moved = (trained / self.replicas) if self.zero else local
        after = self._step_matrices(stage, after)
        copies = self.copied.stepped_share * moved
        if self.stage.parallel.host == "plain" and self.replicas > 1:
            copies = _AVERAGE * local
        if self.stage.parallel.offload != "none":
            seconds = (4 + 4 + _ADAM + _NORM) * moved / (hardware.host_gigabytes_per_second * 1e9)
            after = (self._add(stage, "compute", seconds, after, OFFLOAD),)
            moved = 0.0
        moved_bytes = (_ADAM + _NORM) * moved + _TWIN * twins / (self.replicas if self.zero == 3 else 1)
        seconds = hardware.move_seconds(moved_bytes) + hardware.copy_seconds(copies)
        after = (self._add(stage, "compute", seconds, after, OPTIMIZER),)
        if self.zero in (1, 2):
            after = (self._gather_parts(stage, sizes, after),)
        return after

    def _gather_parts(self, stage: int, sizes: Sequence[LayerSize], after: tuple[int, ...]) -> int:
        """ZeRO 1 and 2: what each replica has moved, in two bytes where every use casts to them."""
        owned = self.division.owned(stage) if self.replicas > 1 else ()
        tied = self.division.tied  # layers that other stages of a pipeline read too, which are gathered exactly
        rounding = [self.work.layers[name] for name in owned if name not in tied]
        dense, experts = sum(size.rounded for size in rounding), sum(size.rounded_experts for size in rounding)
        moved = (_ROUND + _ROUND_OWN / self.replicas) * (dense + experts / self.experts)
        spared = 2.0 * dense, 2.0 * experts
        return self._over_replicas(stage, sizes, all_gather, after, GATHER, spared=spared, moved=moved)

    def _step_matrices(self, stage: int, after: tuple[int, ...]) -> tuple[int, ...]:
        """Muon: runs of the momentum to the owners of matrices, products there, runs of the step back.

        Where every replica holds everything, nothing goes to the owners, and steps go to all.
        """
        matrices = [one for size in self.sizes[stage] for one in size.matrices]
        if not matrices:
            return after
        owning = self.replicas
        if owning > 1:
            dense, banks = (
                4.0 * sum(one.held(self.experts) for one in matrices_of(matrices, in_bank=in_bank))
                for in_bank in (False, True)
            )
            copies = self.replicas // self.experts
            if self.zero:
                there = all_to_all(dense / owning, self.data)
                there += self._over_copies(lambda size, group: all_to_all(size / copies, group), banks)
                sent = there * 2.0
            else:
                sent = all_gather(dense, self.data) + self._over_copies(all_gather, banks)
            after = (self._transfer(stage, sent, after, MATRICES),)
        counts = worked_on(matrices, owning=owning, expert_parallel=self.experts)
        work = muon_operations(self.stage.optimizer.muon.settled(self.stage.parallel.precision), counts)
        runs = sum(one.elements / owning if self.zero else one.held(self.experts) for one in matrices)
        seconds = self.hardware.seconds(work)
        seconds += self.hardware.copy_seconds((COPIED_BYTES_SHARDED if self.zero else COPIED_BYTES) * runs)
        # AdamW's bytes are counted for all elements.
        seconds += self.hardware.move_seconds((MOVED_BYTES - _ADAM) * runs)
        if self.stage.parallel.offload != "none":  # the products stay on the device
            seconds += 8 * runs / (self.hardware.host_gigabytes_per_second * 1e9)
        return (self._add(stage, "compute", seconds, after, OPTIMIZER),)

    def _held(self, size: LayerSize) -> float:
        """Trained elements of a layer for which a process has gradients; of experts those of its part."""
        return size.trained - size.experts * (1 - 1 / self.experts)

    def _compute(self, stage: int, operations: Operations, after: Sequence[int]) -> int:
        if id(operations) not in self._seconds:  # the same in every micro-batch
            slowest = self.hardware.slowest(self.cluster.processes)
            self._seconds[id(operations)] = slowest * self.hardware.seconds(operations)
        return self._add(stage, "compute", self._seconds[id(operations)], after, COMPUTE)

    @property
    def _overlaps(self) -> bool:
        """DeepSpeed overlaps with ZeRO-3 alone, and not where the optimizer is offloaded."""
        return self.hardware.overlaps and self.zero == 3 and self.stage.parallel.offload == "none"

    def _gather(self, stage: int, one: Pass, after: tuple[int, ...]) -> tuple[int, ...]:
        """ZeRO-3: a layer's weights, while the layer before it computes."""
        if self.zero < 3 or self.replicas == 1:
            return ()
        size = self.work.layers[one.layer]
        dense, experts = size.gathered, size.gathered_experts / self.experts
        total = all_gather(dense, self.data) + self._over_copies(all_gather, experts)
        copies = self.copied
        moved = (copies.gathered + copies.gathered_share / self.replicas) * (dense + experts) / 4.0
        return (self._transfer(stage, total, after, GATHER, waits=not self._overlaps, moved=moved),)

    def _reduce(self, stage: int, sizes: Sequence[LayerSize], after: tuple[int, ...], *, waits: bool = True) -> int:
        collective: Collective = reduce_scatter if self.scatters else all_reduce
        held = sum(self._held(size) for size in sizes)
        copies = self.copied
        moved = (copies.reduced + copies.reduced_share / self.replicas) * held
        width = 4.0
        if self.stage.parallel.communication_dtype == "bf16":
            back = held / self.replicas if self.scatters else held  # a scattered gradient by its owner alone
            width, moved = 2.0, moved + _CAST * (held + back)
        return self._over_replicas(stage, sizes, collective, after, REDUCE, width=width, waits=waits, moved=moved)

    def _over_replicas(
        self,
        stage: int,
        sizes: Sequence[LayerSize],
        collective: Collective,
        after: tuple[int, ...],
        cause: str,
        *,
        width: float = 4.0,
        spared: tuple[float, float] = (0.0, 0.0),
        waits: bool = True,
        moved: float = 0.0,
    ) -> int:
        """A collective of ``width`` bytes per trained parameter: dense ones over all replicas, experts over copies.

        Of all dense parameters, and of all experts, ``spared`` bytes less.
        """
        experts = sum(size.experts for size in sizes)
        dense = sum(size.trained for size in sizes) - experts
        total = collective(width * dense - spared[0], self.data)
        buckets = max(1, -(-dense // self.work.zero.bucket)) if self.zero else 1
        total = replace(
            total,
            within_messages=total.within_messages * buckets,
            between_messages=total.between_messages * buckets,
        )
        total += self._over_copies(collective, (width * experts - spared[1]) / self.experts)
        return self._transfer(stage, total, after, cause, waits, moved)

    def _over_copies(self, collective: Collective, size: float) -> Transfer:
        """A collective over the processes that hold the same experts."""
        if not size:
            return Transfer()
        return collective(size, self.cluster.group(self.replicas // self.experts, self.experts))

    def _trade(self, stage: int, one: Pass, rows: float, after: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes of a pass' rows to the experts and back, in either direction of the step."""
        if self.experts == 1 or not rows:
            return after
        total = all_to_all(rows, self.cluster.group(self.experts)) * 2.0
        return (self._transfer(stage, total, after, EXPERTS, moved=one.reordered * rows),)

    def _transfer(
        self,
        stage: int,
        transfer: Transfer,
        after: Sequence[int],
        cause: str,
        waits: bool = True,
        moved: float = 0.0,
    ) -> int:
        """Occupies the link, or the device if that waits for it. ``moved`` bytes are copied before or after it.

        Beside the computation the copies still take turns with it on the device, as do the multiprocessors that the
        collective occupies: as if the device worked for it alone for their share of its time.
        """
        known = self.built.traffic[stage].get(cause, Transfer())
        self.built.traffic[stage][cause] = known + transfer
        seconds, copied = transfer.seconds(self.hardware), self.hardware.copy_seconds(moved)
        if waits or not self.hardware.overlaps:
            return self._add(stage, "compute", seconds + copied, after, cause)
        if self.hardware.multiprocessors is not None:
            copied += seconds * COLLECTIVE_MULTIPROCESSORS / self.hardware.multiprocessors
        if transfer.kind == "gather":
            return self._add(stage, "compute", copied, [self._add(stage, "link", seconds, after, cause)], cause)
        return self._add(stage, "link", seconds, [self._add(stage, "compute", copied, after, cause)], cause)

    def _add(self, stage: int, resource: str, seconds: float, after: Sequence[int], cause: str) -> int:
        return self.built.add(f"{stage}/{resource}", seconds, after, cause)


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Passes of a pipeline stage in order: a forward pass for each later stage, then forward and backward in turns."""
    ahead = min(stages - stage - 1, micro_batches)
    order = [("forward", number) for number in range(ahead)]
    for number in range(micro_batches):
        if ahead + number < micro_batches:
            order.append(("forward", ahead + number))
        order.append(("backward", number))
    return order
