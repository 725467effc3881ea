"""The zero host: DeepSpeed shards optimizer, gradients and parameters (ZeRO 0-3) around the unchanged chain."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import PlanError
from engine.hosts.contrast import StepContrast
from engine.hosts.holdings import HoldingHost, Holdings
from engine.hosts.micro_batch import LayoutKey, PlanLayout, first_states
from engine.hosts.stores import Store, WholeStore, ZeroStore
from engine.hosts.zero.engine import (
    LossModule,
    import_deepspeed,
    marked_optimizer,
    start_engine,
    zero_config,
)
from engine.hosts.zero.experts import ExpertParallel
from engine.hosts.zero.flats import FlatGathers, FlatReduction, flats_of
from engine.hosts.zero.loops import gather_without_loops
from engine.hosts.zero.mapped import move_to_files
from engine.hosts.zero.norm import read_norm_by
from engine.hosts.zero.partitions import (
    everything_read,
    forget_gradients,
    gather_as_used,
    held_alike,
    skip_unread,
    stored_partition,
)
from engine.hosts.zero.sizes import ZeroSizes
from engine.hosts.zero.traces import Traces
from engine.plan.parallel import CommunicationDtype, Offloading
from engine.processes.collectives import broadcast_together, make_gather
from engine.step.optimizer import OptimizerConfig, Origins, parameter_groups, set_learning_rates
from engine.step.report import StepAverages, StepResult, StepScalars, Votes, no_votes
from moe.working import gather_on_use
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.state import State
from omnivl.data.batch import Batch


class ZeroHost(HoldingHost):
    """Runs the chain under DeepSpeed. See ``engine.hosts.base.Host`` for what each method promises."""

    def __init__(
        self,
        chain: Chain,
        optimizer: OptimizerConfig,
        plan_layout: PlanLayout,
        *,
        total_steps: int,
        zero_stage: Literal[0, 1, 2, 3],
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        device: torch.device | None = None,
        origins: Origins | None = None,
        offload: Offloading = Offloading(),  # noqa: B008 - frozen
        expert_parallel_size: int = 1,
        communication_dtype: CommunicationDtype = "fp32",
        contrasts_step: bool = False,
    ) -> None:
        """Starts DeepSpeed over the default process group, which has to exist.

        Args:
            chain: Fresh or loaded, on the CPU; with ZeRO-3 also one whose layers ``ZeroBuild`` has sharded for the same
                expert-parallel size and offloading. Replica 0's weights and buffers become everyone's.
            optimizer: AdamW or Muon, schedule, clipping.
            plan_layout: Layout of a micro-batch.
            total_steps: Optimizer steps of the stage, for the schedule.
            zero_stage: What is sharded: nothing, optimizer states (1), gradients too (2), parameters too (3).
            micro_batch_size: Samples of a micro-batch on one replica.
            gradient_accumulation_steps: Micro-batches per optimizer step.
            device: Where the chain runs; the CPU where it is not given.
            origins: Where starting values of parameters come from; None: all are random.
            offload: What is offloaded: nothing with ZeRO 0, parameters with ZeRO-3 only.
            expert_parallel_size: Processes over which every bank of sparse experts is split; 1 for none.
            communication_dtype: Type in which gradients are sent between replicas.
            contrasts_step: Whether all micro-batches of a step are contrasted (``engine.hosts.contrast``).

        Raises:
            PlanError: Something is offloaded that is not sharded, or to a folder that cannot be used; processes or
                experts cannot be divided so.
        """
        if (offload.optimizer and zero_stage == 0) or (offload.parameters and zero_stage < 3):
            got, allowed = ("parameters", "3") if offload.parameters else ("optimizer", "1, 2 and 3")
            raise PlanError(
                [f"parallel.offload: got {got!r} with zero_stage {zero_stage}; allowed with {allowed}; change either"]
            )
        self.device = device or torch.device("cpu")
        self.chain = chain.to(self.device)
        self.gather: Gather = make_gather()
        self._config = optimizer
        self._plan_layout = plan_layout
        self._total_steps = total_steps
        self._accumulation = gradient_accumulation_steps
        self._zero_stage = zero_stage
        import_deepspeed(self.device)
        broadcast_together(held_alike(chain))
        self._experts = ExpertParallel(expert_parallel_size)
        self._experts.cut(chain)
        apart = self._experts.parameters(chain)
        parts = zero_stage in (1, 2) and self.gather.replicas > 1
        self._groups = parameter_groups(chain, optimizer, origins, apart=apart, divide=parts)
        self._trained = [parameter for entry in self._groups for parameter in entry.parameters]
        sizes = ZeroSizes.of(chain.layers)
        config = zero_config(
            stage=zero_stage,
            gradient_clipping=optimizer.gradient_clipping,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            sizes=sizes,
            offload=offload,
            communication_dtype=communication_dtype,
            replicas=self.gather.replicas,
        )
        self._optimizer = marked_optimizer(self._groups, optimizer, self._experts.group_name)
        sign = self._experts.sign() if zero_stage < 3 else None  # ZeRO-3 takes it from the parameters' attributes
        self._engine = start_engine(LossModule(chain, sign), self._optimizer, config)
        self._gathers: FlatGathers | None = None
        if parts:
            zero, flats = self._engine.optimizer, flats_of(self._engine.optimizer)
            if zero_stage == 1 and not offload.optimizer:
                FlatReduction(zero, flats, sizes.bucket)
            followed = {id(parameter) for parameter in chain.followed_parameters()}
            self._gathers = FlatGathers(zero, flats, sizes.bucket, followed)
        if zero_stage > 0:
            store: Store = ZeroStore(self._engine, zero_stage, self._groups, chain, self.device, self._gathers)
        else:
            replicas = dist.group.WORLD if self.gather.replicas > 1 else None
            store = WholeStore(
                *(self._optimizer, self._groups, chain, self.device), replicas=replicas, experts=self._experts.replicas
            )
        self._average: Callable[[Tensor], StepAverages] | None = None
        self._averages = StepAverages({})
        if zero_stage > 0:
            read_norm_by(self._engine.optimizer, zero_stage, self._read_norm)
        if offload.folder is not None:
            move_to_files(self._engine, zero_stage, offload.folder, parameters=offload.parameters)
        if zero_stage == 3:
            chain.set_local_storage(stored_partition)
            for parameter in chain.parameters():
                gather_on_use(parameter)
            skip_unread()
            gather_without_loops(list(chain.parameters()))
        self._contrast = StepContrast(chain, self._reading) if contrasts_step else None
        self._traces = Traces(self._engine) if zero_stage == 3 else None
        self._of_unknown_use = list(chain.parameters()) if zero_stage == 3 else []
        self._holdings = Holdings(chain, store, self.gather)

    @contextmanager
    def whole_chain(self) -> Iterator[Chain]:
        """The chain with exact values. Under ZeRO-3 its layers gather all of their parameters when they are called."""
        if self._gathers is not None:
            self._gathers.make_exact()
        with everything_read(self._engine) if self._zero_stage == 3 else nullcontext():
            yield self.chain

    def step(self, batches: Sequence[Batch], step: int, votes: Votes = no_votes) -> StepResult:
        """Forward and backward over the micro-batches, one optimizer step, ``after_step``."""
        assert len(batches) == self._accumulation, "a step takes gradient_accumulation_steps micro-batches"
        rates = set_learning_rates(self._optimizer, self._groups, self._config.learning_rate(step, self._total_steps))
        forget_gradients(self._engine)
        collected = StepScalars()
        states = first_states(batches, self._plan_layout, self.device, self.chain, self.gather)
        if self._contrast is not None:
            states = self._contrast.twice(states, self._embed, self.chain.discard_step)
        for index, state in enumerate(states):
            if self._traces is not None:
                self._traces.expect(LayoutKey.of(batches[index]))
            loss, named = self._engine(state)
            collected.add(named)
            self._engine.backward(loss)  # divides by the accumulation steps
            if index < len(batches) - 1 and self._engine.managed_gradient_accumulation():
                self._engine.step()  # counts the micro-batch
        self._average = lambda norm: collected.average(self.gather, norm, votes())
        if self._zero_stage == 0:
            self._read_norm(self._clip())
        self._engine.step()  # calls ``_read_norm``, where DeepSpeed takes the norm
        averages, norm, skipped = self._averages, self._averages.gradient_norm, self._optimizer.skip_step
        if skipped:
            self.chain.discard_step()
        else:
            self.chain.after_step()
        self._of_unknown_use = gather_as_used(self._of_unknown_use)
        if self._gathers is not None:
            self._gathers.learn()
        return StepResult(averages.loss, averages.losses, averages.metrics, norm, rates, skipped, averages.votes)

    def _embed(self, state: State) -> State:
        """Runs the chain up to the embeddings."""
        if self._traces is not None:
            self._traces.expect(("embeddings", state.layout.kind, state.layout.objectives, state.layout.num_frames))
        made: State = self._engine(state, embeds=True)
        return made

    def _reading(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Within the context, parameters that ZeRO-3 shards have their values."""
        if self._zero_stage < 3 or not parameters:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
        return gathered

    def _read_norm(self, norm: Tensor) -> float:
        """Reads back all that the step reports; the weights are left as they are where anything is not finite.

        Args:
            norm: Of the gradients, before clipping; DeepSpeed gives -1 where one was not finite.
        """
        assert self._average is not None, "called within a step"
        self._averages = self._average(norm)
        self._optimizer.skip_step = not self._averages.are_finite
        return self._averages.gradient_norm

    def _clip(self) -> Tensor:
        """ZeRO 0: clips the gradients, which are whole on every replica except for those of experts that are split."""
        dense, split = (
            [p.grad for group in self._groups if group.apart == apart for p in group.parameters if p.grad is not None]
            for apart in (False, True)
        )
        norm = nn.utils.get_total_norm(dense, foreach=True)
        if self._experts.group is not None:
            square = nn.utils.get_total_norm(split, foreach=True).to(self.device).square()
            dist.all_reduce(square, group=self._experts.group)
            norm = (norm.square() + square).sqrt()
        if self._config.gradient_clipping > 0:
            nn.utils.clip_grads_with_norm_(self._trained, self._config.gradient_clipping, norm, foreach=True)
        return norm
