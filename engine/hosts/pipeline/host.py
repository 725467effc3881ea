"""The pipeline host: DeepSpeed passes micro-batches through stages of the chain on different processes.

With W processes and S stages, processes 0 .. W / S - 1 hold the first stage, each a replica of it, the next W / S the
second, and so on. Every process keeps the modules of the whole chain, for evaluation, and the tensors of its own
stage's layers: those of the others have no memory outside ``whole_chain``.
"""

import contextlib
import io
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import PlanError
from engine.hosts.holdings import HoldingHost, Holdings
from engine.hosts.micro_batch import PlanLayout, first_state
from engine.hosts.pipeline.packing import pack, unpack
from engine.hosts.stores import WholeStore, ZeroStore
from engine.hosts.zero.engine import import_deepspeed, skipping_adamw, zero_config
from engine.hosts.zero.experts import ExpertParallel
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.parallel import Offloading
from engine.processes.collectives import broadcast_from, broadcast_from_first, make_gather
from engine.step.optimizer import OptimizerConfig, ParameterGroup, parameter_groups, set_learning_rates
from engine.step.report import StepAverages, StepResult, StepScalars, scalars
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather
from omnivl.data.batch import Batch


@dataclass(frozen=True)
class Place:
    """Where a process stands in the grid of stages and replicas.

    Attributes:
        stages: S.
        replicas: Replicas of each stage, W / S.
        stage: This process' stage.
        replica: Which replica of it.
        data_group: The replicas of this stage.
        pipe_group: The stages of this replica, first to last.
    """

    stages: int
    replicas: int
    stage: int
    replica: int
    data_group: dist.ProcessGroup
    pipe_group: dist.ProcessGroup

    @property
    def is_last(self) -> bool:
        """Whether losses are computed here."""
        return self.stage == self.stages - 1


_PLACES: dict[int, Place] = {}


def place_in_pipeline(stages: int) -> Place:
    """This process' place, with its groups, which are made once. Called by every process of the run.

    Raises:
        PlanError: The number of processes is no multiple of the stages.
    """
    if stages not in _PLACES:
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % stages != 0:
            raise PlanError(
                [
                    f"parallel.pipeline_stages: got {stages} for {world} processes; allowed is a divisor of their "
                    "number; change it or launch.processes"
                ]
            )
        replicas = world // stages
        data = [dist.new_group(list(range(s * replicas, (s + 1) * replicas))) for s in range(stages)]
        pipe = [dist.new_group([s * replicas + r for s in range(stages)]) for r in range(replicas)]
        stage, replica = divmod(rank, replicas)
        _PLACES[stages] = Place(stages, replicas, stage, replica, data[stage], pipe[replica])
    return _PLACES[stages]


class PipelineStage(nn.Module):
    """The layers of one stage, as one layer of DeepSpeed's module.

    Attributes:
        fillers: Elements without a gradient, one for each optimizer group of which the stage has nothing: DeepSpeed
            takes the norm group by group over all stages.
        sign: ``ExpertParallel.sign``, which is never called.
        collected: Scalars of the step's micro-batches; on the last stage.
    """

    def __init__(self, layers: Sequence[ChainLayer], place: Place, sign: nn.Module | None) -> None:
        super().__init__()
        self.layers, self._place, self.sign = nn.ModuleList(layers), place, sign
        self.fillers = nn.ParameterList()
        self.collected = StepScalars()

    def forward(self, packed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        """The packed state behind the stage; behind the last one the loss of the micro-batch."""
        state, token = unpack(*packed)
        if self._place.stage == 0:
            token = torch.zeros_like(token).requires_grad_()
        for layer in self.layers:
            state = layer(state)
        if not self._place.is_last:
            return pack(state, token)
        self.collected.add(scalars(state))
        return state["loss"] + 0.0 * token.sum()


class PipelineHost(HoldingHost):
    """Trains a stage of the chain. See ``engine.hosts.base.Host`` for what each method promises."""

    def __init__(
        self,
        chain: Chain,
        optimizer: OptimizerConfig,
        plan_layout: PlanLayout,
        *,
        cuts: Sequence[range],
        total_steps: int,
        zero_stage: Literal[0, 1],
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        device: torch.device | None = None,
        pretrained: Collection[str] = (),
        expert_parallel_size: int = 1,
    ) -> None:
        """Starts DeepSpeed over the default process group, which has to exist.

        Args:
            chain: Fresh or loaded, on the CPU, its gather over ``place_in_pipeline(...).data_group``. Process 0's
                weights and buffers become everyone's.
            optimizer: AdamW, schedule, clipping.
            plan_layout: Layout of a micro-batch.
            cuts: The layers of each stage, by their places in the chain.
            total_steps: Optimizer steps of the stage, for the schedule.
            zero_stage: What is sharded over the replicas of a stage: nothing (0) or optimizer states (1).
            micro_batch_size: Samples of a micro-batch on one replica.
            gradient_accumulation_steps: Micro-batches per optimizer step, which fill the pipeline.
            device: Where the chain runs; the CPU where it is not given.
            pretrained: Names of parameters that came from a checkpoint of other origin.
            expert_parallel_size: Replicas of a stage over which every bank of sparse experts is cut; 1 for none.

        Raises:
            PlanError: Processes or experts that cannot be cut.
        """
        self.device = device or torch.device("cpu")
        self.place = place_in_pipeline(len(cuts))
        self.chain = chain.to(self.device)
        self.gather: Gather = make_gather(self.place.data_group)
        self._config, self._plan_layout, self._total_steps = optimizer, plan_layout, total_steps
        self._accumulation, self._zero_stage = gradient_accumulation_steps, zero_stage
        import_deepspeed(self.device)
        names = [name for name, _ in chain.named_children()]
        self._stage_of = {names[index]: stage for stage, part in enumerate(cuts) for index in part}
        self._own = [name for name in names if self._stage_of[name] == self.place.stage]
        for tensor in chain.state_dict().values():
            broadcast_from_first(tensor)
        self._experts = ExpertParallel(expert_parallel_size, stages=self.place.stages)
        self._experts.cut(chain)
        self._all_groups = parameter_groups(chain, optimizer, pretrained, apart=self._experts.parameters(chain))
        self._layers = [cast(ChainLayer, chain.get_submodule(name)) for name in self._own]
        self._stage = PipelineStage(self._layers, self.place, self._experts.sign())
        self._groups = [self._restricted(group) for group in self._all_groups]
        self._norm = 0.0
        self._optimizer = skipping_adamw(self._groups, optimizer, self._experts.group_name)
        self._engine = self._start(micro_batch_size)
        store = ZeroStore(self._engine, 1) if zero_stage == 1 else WholeStore(self._optimizer)
        self._holdings = Holdings(
            chain, store, make_gather(), own=self._own, writers=self.gather, borrow=self._borrowed
        )
        for name in names:
            if name not in self._own:
                _release(_tensors(chain, name))

    def _start(self, micro_batch_size: int) -> Any:
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe import schedule

        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        stages: list[Any] = [LayerSpec(nn.Identity)] * self.place.stages
        stages[self.place.stage] = self._stage
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds and its cut, which are not ours
            module = PipelineModule(
                stages, num_stages=self.place.stages, partition_method="uniform", dynamic_shape=True
            )
            config = zero_config(
                stage=self._zero_stage,
                gradient_clipping=self._config.gradient_clipping,
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=self._accumulation,
                sizes=ZeroSizes.of(self._layers),
                offload=Offloading(),
                communication_dtype="fp32",
            )
            config.pop("managed_gradient_accumulation")
            engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        step = type(engine)._exec_optimizer_step

        def guarded(engine: Any, lr_kwargs: Any = None) -> None:
            self._before_step()
            step(engine, lr_kwargs)

        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.OptimizerStep: guarded}
        return engine

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Passes the micro-batches through the stages, one optimizer step, ``after_step``."""
        whole = len(batches) == self._accumulation
        assert whole or not self.takes_batches, "a step takes gradient_accumulation_steps micro-batches"
        rate = self._config.learning_rate(step, self._total_steps)
        set_learning_rates(self._optimizer, self._groups, rate)
        self._stage.collected = StepScalars()
        self._engine.train_batch(self._packed(batches))
        averages = self._from_last(self._stage.collected.average(self.gather) if self.place.is_last else None)
        skipped = self._optimizer.skip_step
        if self._zero_stage == 1:
            self._norm = float(self._engine.get_global_grad_norm())
            skipped |= bool(self._engine.optimizer.overflow)
        for layer in self._layers:
            layer.discard_step() if skipped else layer.after_step()
        rates = {group.name: rate * group.lr_scale for group in self._all_groups}
        return StepResult(averages.loss, averages.losses, averages.metrics, self._norm, rates, skipped)

    @property
    def takes_batches(self) -> bool:
        """The first stage does."""
        return self.place.stage == 0

    @contextlib.contextmanager
    def whole_chain(self) -> Iterator[Chain]:
        """The chain with the weights of every stage as they are now. Called by every process."""
        with contextlib.ExitStack() as stack:
            for name in self._stage_of:
                stack.enter_context(self._borrowed(name))
            yield self.chain

    @contextlib.contextmanager
    def _borrowed(self, name: str) -> Iterator[None]:
        """Gives a layer of another stage memory, and what its own stage has, for a while."""
        tensors = _tensors(self.chain, name)
        foreign = name not in self._own
        for tensor in tensors:
            if foreign:
                tensor.untyped_storage().resize_(tensor.nbytes)
            broadcast_from(tensor, self._stage_of[name], self.place.pipe_group)
        try:
            yield
        finally:
            if foreign:
                _release(tensors)

    def _packed(self, batches: Sequence[Batch]) -> Iterator[tuple[Any, Tensor]]:
        """What DeepSpeed reads: packed states at the head of the chain where that is, and labels that nobody reads."""
        none = torch.zeros(1, device=self.device)
        for index in range(self._accumulation):
            head = (none, none)
            if self.takes_batches:
                head = pack(first_state(batches[index], self._plan_layout, self.device), none)
            yield head, none

    def _before_step(self) -> None:
        """Tells every process whether all losses are finite; with stage 0 also clips by the norm over all stages."""
        losses = self._stage.collected.local("loss") if self.place.is_last else torch.zeros((), device=self.device)
        sums = torch.stack([losses, torch.zeros_like(losses)])
        gradients: dict[bool, list[Tensor]] = {False: [], True: []}
        for group in self._groups:
            gradients[group.apart] += [one.grad for one in group.parameters if one.grad is not None]
        if self._zero_stage == 0:
            # Equal gradients are held by the replicas of a stage, those of experts by the copies: each gives its share.
            for apart, holders in ((False, self.place.replicas), (True, self._experts.copies)):
                sums[1] += nn.utils.get_total_norm(gradients[apart], foreach=True).to(self.device).square() / holders
        dist.all_reduce(sums)  # one NaN or infinity survives, and all decide alike
        self._norm = float(sums[1].sqrt())
        self._optimizer.skip_step = not bool(sums.isfinite().all())
        if self._zero_stage == 0 and self._config.gradient_clipping > 0:
            parameters = [one for group in self._groups for one in group.parameters]
            nn.utils.clip_grads_with_norm_(parameters, self._config.gradient_clipping, sums[1].sqrt(), foreach=True)

    def _from_last(self, averages: StepAverages | None) -> StepAverages:
        """What the last stage of this replica has, on all of its stages."""
        box = [averages]
        dist.broadcast_object_list(box, group=self.place.pipe_group, group_src=self.place.stages - 1)
        assert box[0] is not None
        return box[0]

    def _restricted(self, group: ParameterGroup) -> ParameterGroup:
        """The part of a group that belongs to this stage, a new filler where there is none."""
        pairs = zip(group.names, group.parameters, strict=True)
        kept = [(name, one) for name, one in pairs if name.split(".", 1)[0] in self._own]
        if not kept:
            filler = nn.Parameter(torch.zeros(1, device=self.device))
            if group.apart:
                self._experts.mark(filler)
            self._stage.fillers.append(filler)
            kept = [(f"fillers.{len(self._stage.fillers) - 1}", filler)]
        return replace(group, names=tuple(name for name, _ in kept), parameters=tuple(one for _, one in kept))


def _tensors(chain: Chain, name: str) -> list[Tensor]:
    """Parameters and buffers of a layer, without a gradient."""
    return list(chain.get_submodule(name).state_dict().values())


def _release(tensors: Sequence[Tensor]) -> None:
    """Takes the memory from tensors and leaves their shapes."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
