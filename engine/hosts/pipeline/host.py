"""The pipeline host: DeepSpeed passes micro-batches through stages of the chain on different processes.

With W processes and S stages, processes 0 .. W / S - 1 hold the first stage, each a replica of it, the next W / S the
second, and so on. Every process keeps the modules of the whole chain, for evaluation, but only the tensors of its own
stage's layers: the other layers have no memory outside ``whole_chain``. If several stages have a layer, each has a
copy, and one of them trains it (``engine.hosts.pipeline.division``).
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from engine.hosts.base import WeightsReport
from engine.hosts.contrast import Draws, StepContrast
from engine.hosts.holdings import HoldingHost, Holdings
from engine.hosts.micro_batch import LayoutKey, PlanLayout, first_states
from engine.hosts.pipeline.copies import Copies
from engine.hosts.pipeline.crossing import Crossing
from engine.hosts.pipeline.division import Division
from engine.hosts.pipeline.packing import key_of
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.pipeline.scalars import ScalarNames, StepSums
from engine.hosts.pipeline.stage import PipelineStage, StagePass
from engine.hosts.stores import Store, WholeStore, ZeroStore
from engine.hosts.zero.engine import import_deepspeed, marked_optimizer, zero_config
from engine.hosts.zero.experts import ExpertParallel
from engine.hosts.zero.flats import FlatGathers, FlatReduction, flats_of
from engine.hosts.zero.norm import read_norm_by
from engine.hosts.zero.sizes import ZeroSizes
from engine.hosts.zero.start import already_equal
from engine.plan.parallel import CommunicationDtype, Offloading
from engine.processes.collectives import broadcast_from, broadcast_together, make_gather
from engine.step.optimizer import OptimizerConfig, Origins, ParameterGroup, parameter_groups, set_learning_rates
from engine.step.report import StepAverages, StepResult, Votes, no_votes
from omnivl.chain.chain import EMBEDDING_STACK, Chain, ChainLayer
from omnivl.chain.gather import Gather
from omnivl.chain.state import State
from omnivl.data.batch import Batch


class PipelineHost(HoldingHost):
    """Trains a stage of the chain. See ``engine.hosts.base.Host`` for what each method promises."""

    def __init__(
        self,
        chain: Chain,
        optimizer: OptimizerConfig,
        plan_layout: PlanLayout,
        *,
        division: Division,
        total_steps: int,
        zero_stage: Literal[0, 1],
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        device: torch.device | None = None,
        origins: Origins | None = None,
        expert_parallel_size: int = 1,
        communication_dtype: CommunicationDtype = "fp32",
        contrasts_step: bool = False,
    ) -> None:
        """Starts DeepSpeed over the default process group, which has to exist.

        Args:
            chain: Fresh or loaded, on the CPU, its gather over ``place_in_pipeline(...).data_group``. Process 0's
                weights and buffers become everyone's.
            optimizer: AdamW or Muon, schedule, clipping.
            plan_layout: Layout of a micro-batch.
            division: Which passes each stage makes, and which layers it trains.
            total_steps: Optimizer steps of the stage, for the schedule.
            zero_stage: What is sharded over the replicas of a stage: nothing (0) or optimizer states (1).
            micro_batch_size: Samples of a micro-batch on one replica.
            gradient_accumulation_steps: Micro-batches per optimizer step, which fill the pipeline.
            device: Where the chain runs; the CPU where it is not given.
            origins: Where starting values of parameters come from; None: all are random.
            expert_parallel_size: Replicas of a stage over which every bank of sparse experts is cut; 1 for none.
            communication_dtype: Type in which gradients are sent between the replicas of a stage.
            contrasts_step: Whether all micro-batches of a step are contrasted (``engine.hosts.contrast``).

        Raises:
            PlanError: Processes or experts cannot be divided so.
        """
        self.device = device or torch.device("cpu")
        self.place = place_in_pipeline(len(division.cuts))
        self.chain = chain.to(self.device)
        self.gather: Gather = make_gather(self.place.data_group)
        self._config, self._plan_layout, self._total_steps = optimizer, plan_layout, total_steps
        self._accumulation, self._zero_stage = gradient_accumulation_steps, zero_stage
        self._communication_dtype = communication_dtype
        import_deepspeed(self.device)
        self.division = division
        self._own, self._held = self.division.owned(self.place.stage), self.division.held(self.place.stage)
        broadcast_together(chain.state_dict().values())
        self._experts = ExpertParallel(expert_parallel_size, stages=self.place.stages)
        self._experts.cut(chain)
        partitioned = zero_stage == 1 and self.gather.replicas > 1
        apart = self._experts.parameters(chain)
        self._all_groups = parameter_groups(chain, optimizer, origins, apart=apart, divide=partitioned)
        self._layers = [_layer(chain, name) for name in self._held]
        self._crossing = Crossing(self.place, self.device)
        self._stage = PipelineStage(
            *(self._passes(), self._own_layers(), self.place, self._crossing, plan_layout, self._experts.sign()),
            embeds_further=self.division.cuts[self.place.stage][-1] < self._last_embedding,
        )
        self._contrast = StepContrast(chain) if contrasts_step else None
        self._copies = Copies(chain, self.division, self.place.stage, self.place.pipe_group)
        self._groups = [self._restricted(group) for group in self._all_groups]
        self._votes: Votes = no_votes
        self._micro_batches: Iterator[tuple[State, LayoutKey]] = iter(())
        self._sums: StepSums | None = None
        self._averages, self._names = StepAverages({}), ScalarNames(self.place)
        self._optimizer = marked_optimizer(self._groups, optimizer, self._experts.group_name)
        self._engine = self._start(micro_batch_size)
        self._gathers: FlatGathers | None = None
        if partitioned:
            zero, flats = self._engine.optimizer, flats_of(self._engine.optimizer)
            FlatReduction(zero, flats, self._sizes.bucket)
            # Another stage may read its copy of a tied layer without a cast.
            tied = (one for name in self.division.tied for one in _layer(chain, name).parameters())
            exact = {id(one) for one in (*chain.followed_parameters(), *tied)}
            self._gathers = FlatGathers(zero, flats, self._sizes.bucket, exact)
        if zero_stage == 1:
            read_norm_by(self._engine.optimizer, zero_stage, self._read_norm)
        named = [*self._all_groups, *self._groups]  # those of other stages too, and this stage's fillers
        if zero_stage == 1:
            store: Store = ZeroStore(self._engine, 1, named, chain, self.device, self._gathers)
        else:
            replicas = self.place.data_group if self.gather.replicas > 1 else None
            store = WholeStore(
                *(self._optimizer, named, chain, self.device), replicas=replicas, experts=self._experts.replicas
            )
        self._holdings = Holdings(
            chain, store, make_gather(), own=self._own, writers=self.gather, borrow=self._borrowed
        )
        for name in self.division.stages_of:
            if name not in self._held:
                _release(_tensors(chain, name))

    def _own_layers(self) -> list[ChainLayer]:
        return [_layer(self.chain, name) for name in self._own]

    def _passes(self) -> list[StagePass]:
        """Passes of this stage, used and unused ones."""
        made = self.division.passes[self.place.stage]
        return [
            StagePass(_layer(self.chain, one[0]), one[1], one in made, place <= self._last_embedding)
            for place, one in ((place, self.chain.passes[place]) for place in self.division.cuts[self.place.stage])
        ]

    @property
    def _sizes(self) -> ZeroSizes:
        return ZeroSizes.of(self._layers or self.chain.layers)

    @property
    def _last_embedding(self) -> int:
        """The pass, by its index in the chain, that makes contrastive embeddings; the last one where none does."""
        stacks = [layer.stack for layer in self.chain.program]
        return stacks.index(EMBEDDING_STACK) if EMBEDDING_STACK in stacks else len(stacks) - 1

    def _start(self, micro_batch_size: int) -> Any:
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe import schedule

        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        stages: list[Any] = [LayerSpec(nn.Identity)] * self.place.stages
        stages[self.place.stage] = self._stage
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds and its own partition, which do not apply
            module = PipelineModule(
                stages, num_stages=self.place.stages, partition_method="uniform", dynamic_shape=True
            )
            config = zero_config(
                stage=self._zero_stage,
                gradient_clipping=self._config.gradient_clipping,
                micro_batch_size=micro_batch_size,
                gradient_accumulation_steps=self._accumulation,
                sizes=self._sizes,
                offload=Offloading(),
                communication_dtype=self._communication_dtype,
                replicas=self.gather.replicas,
            )
            config.pop("managed_gradient_accumulation")
            with already_equal():
                engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)
        step = type(engine)._exec_optimizer_step

        def guarded(engine: Any, lr_kwargs: Any = None) -> None:
            self._before_step()
            step(engine, lr_kwargs)

        def gathered(engine: Any) -> None:
            self._copies.gather_gradients()

        # DeepSpeed's tied layers are modules of a list; here there is one module for each stage. Its transfers wait for
        # the device to learn the sizes.
        ours = {
            schedule.ReduceTiedGrads: gathered,
            schedule.OptimizerStep: guarded,
            schedule.LoadMicroBatch: self._load,
            schedule.SendActivation: self._send_state,
            schedule.RecvActivation: self._receive_state,
            schedule.SendGrad: self._send_gradient,
            schedule.RecvGrad: self._receive_gradient,
        }
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **ours}
        return engine

    def step(self, batches: Sequence[Batch], step: int, votes: Votes = no_votes) -> StepResult:
        """Passes the micro-batches through the stages, one optimizer step, ``after_step``."""
        whole = len(batches) == self._accumulation
        assert whole or not self.takes_batches, "a step takes gradient_accumulation_steps micro-batches"
        rate = self._config.learning_rate(step, self._total_steps)
        set_learning_rates(self._optimizer, self._groups, rate)
        self._stage.begin()
        self._votes = votes
        self._micro_batches = self._first_states(batches)
        if self._contrast is not None:
            self._contrast_step(self._contrast)
        self._engine.train_batch()
        averages, skipped = self._averages, self._optimizer.skip_step
        if self._gathers is not None:
            self._gathers.learn()
        self._copies.spread_weights()
        for layer in self._layers:
            layer.discard_step() if skipped else layer.after_step()
        rates = {group.name: rate * group.lr_scale for group in self._all_groups}
        return StepResult(
            averages.loss, averages.losses, averages.metrics, averages.gradient_norm, rates, skipped, averages.votes
        )

    @property
    def takes_batches(self) -> bool:
        """The first stage does."""
        return self.place.stage == 0

    @property
    def computes_losses(self) -> bool:
        """The last stage does."""
        return self.place.stage == self.place.stages - 1

    @contextlib.contextmanager
    def whole_chain(self) -> Iterator[Chain]:
        """The chain with the exact weights of every stage as they are now. Called by every process."""
        if self._gathers is not None:
            self._gathers.make_exact()
        with contextlib.ExitStack() as stack:
            for name in self.division.stages_of:
                stack.enter_context(self._borrowed(name))
            yield self.chain

    @contextlib.contextmanager
    def _borrowed(self, name: str) -> Iterator[None]:
        """Within the context, a layer of another stage has memory, with its owner's tensors."""
        tensors = _tensors(self.chain, name)
        foreign = name not in self._held
        for tensor in tensors:
            if foreign:
                tensor.untyped_storage().resize_(tensor.nbytes)
            broadcast_from(tensor, self.division.owners[name], self.place.pipe_group)
        try:
            yield
        finally:
            if foreign:
                _release(tensors)

    def load(self, folder: Path) -> None:
        """Restores what any host saved; copies of layers get it from their owners."""
        super().load(folder)
        self._copies.spread_all()

    def load_weights(self, weights: Mapping[str, Tensor] | None, *, strict: bool = True) -> WeightsReport:
        """Copies replica 0's whole weights into every replica's share, and into the optimizer's copy of them."""
        report = super().load_weights(weights, strict=strict)
        self._copies.spread_all()
        return report

    def _first_states(self, batches: Sequence[Batch]) -> Iterator[tuple[State, LayoutKey]]:
        states = first_states(batches, self._plan_layout, self.device, self.chain, self.gather)
        for batch, state in zip(batches, states, strict=True):
            yield state, LayoutKey.of(batch)

    def _contrast_step(self, contrast: StepContrast) -> None:
        """Embeds all micro-batches, and leaves with the last stage what stands in place of the losses over them."""
        first = list(self._micro_batches)
        self._micro_batches, self._stage.draws = iter(first), Draws(self._accumulation)
        embedded = []
        for place in range(self._accumulation):
            with torch.no_grad(), self._stage.draws.of(place):
                given = first[place] if self.takes_batches else self._crossing.receive_state()
                state = self._stage.embed(given, contrast)
                if state is not None:
                    embedded.append(contrast.embedded(state))
        for layer in self._layers:
            layer.discard_step()
        if self.place.is_last:
            self._stage.cached.extend(contrast.cached(embedded))

    def _load(self, engine: Any, buffer_id: int) -> None:
        """The next micro-batch, on the first stage."""
        if self.takes_batches:
            self._stage.first.append(next(self._micro_batches))
            engine.pipe_buffers["inputs"][buffer_id] = (torch.empty(0, device=self.device),)

    def _send_state(self, engine: Any, buffer_id: int) -> None:
        self._crossing.send_state(engine.pipe_buffers["outputs"][buffer_id])

    def _receive_state(self, engine: Any, buffer_id: int) -> None:
        engine.pipe_buffers["inputs"][buffer_id] = self._crossing.receive_state()

    def _send_gradient(self, engine: Any, buffer_id: int) -> None:
        packed = engine.pipe_buffers["inputs"][buffer_id]
        key = key_of(packed)
        self._crossing.send_gradient(packed[1].grad, key, self._stage.notes[key])
        engine.pipe_buffers["inputs"][buffer_id] = None

    def _receive_gradient(self, engine: Any, buffer_id: int) -> None:
        packed = engine.pipe_buffers["outputs"][buffer_id]
        engine.grad_layer = [self._crossing.receive_gradient(packed[1], key_of(packed))]

    def _before_step(self) -> None:
        """Sums up over all processes what the step reports; with stage 0 also clips by the norm over all stages."""
        self._sums = StepSums(self._stage.collected, self._votes(), self.place, self.device)
        square = torch.zeros((), device=self.device)
        if self._zero_stage == 0:
            gradients: dict[bool, list[Tensor]] = {False: [], True: []}
            for group in self._groups:
                gradients[group.apart] += [one.grad for one in group.parameters if one.grad is not None]
            # The replicas of a stage hold equal gradients, and so do the copies of experts: each contributes its share.
            for apart, holders in ((False, self.place.replicas), (True, self._experts.copies)):
                square += nn.utils.get_total_norm(gradients[apart], foreach=True).to(self.device).square() / holders
        norm = self._sums.add_up(square).sqrt()
        if self._zero_stage == 1:
            return  # DeepSpeed takes the norm and calls ``_read_norm``
        self._read_norm(norm)
        if self._config.gradient_clipping > 0:
            parameters = [one for group in self._groups for one in group.parameters]
            nn.utils.clip_grads_with_norm_(parameters, self._config.gradient_clipping, norm, foreach=True)

    def _read_norm(self, norm: Tensor) -> float:
        """Reads back all that the step reports; the weights are left as they are where anything is not finite.

        Args:
            norm: Of the gradients, before clipping; DeepSpeed gives -1 where one was not finite.
        """
        assert self._sums is not None, "called within a step"
        self._averages = self._sums.read(norm, self._names)
        self._optimizer.skip_step = not self._averages.are_finite
        return self._averages.gradient_norm

    def _restricted(self, group: ParameterGroup) -> ParameterGroup:
        """The part of a group that this stage trains, or a new filler if it trains none."""
        pairs = zip(group.names, group.parameters, strict=True)
        kept = [(name, one) for name, one in pairs if name.split(".", 1)[0] in self._own]
        if not kept:
            filler = nn.Parameter(torch.zeros(1, device=self.device))
            if group.apart:
                self._experts.mark(filler)
            self._stage.fillers.append(filler)
            kept = [(f"fillers.{len(self._stage.fillers) - 1}", filler)]
        return replace(group, names=tuple(name for name, _ in kept), parameters=tuple(one for _, one in kept))


def _layer(chain: Chain, name: str) -> ChainLayer:
    return cast(ChainLayer, chain.get_submodule(name))


def _tensors(chain: Chain, name: str) -> list[Tensor]:
    """Parameters and buffers of a layer, without a gradient."""
    return list(chain.get_submodule(name).state_dict().values())


def _release(tensors: Sequence[Tensor]) -> None:
    """Takes the memory from tensors and leaves their shapes."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
