"""The plain host: the chain in bare PyTorch, gradients averaged over replicas by one all-reduce."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.hosts.contrast import StepContrast
from engine.hosts.holdings import HoldingHost, Holdings
from engine.hosts.micro_batch import PlanLayout, first_states
from engine.hosts.stores import WholeStore
from engine.plan.parallel import CommunicationDtype
from engine.plan.precision import dtype_of
from engine.processes.collectives import broadcast_together, make_gather
from engine.step.optimizer import ChainOptimizer, OptimizerConfig, Origins, parameter_groups, set_learning_rates
from engine.step.report import StepResult, StepScalars, Votes, no_votes, scalars
from moe.working import copy_together
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.data.batch import Batch


class PlainHost(HoldingHost):
    """Runs the chain as it is. See ``engine.hosts.base.Host`` for what each method promises."""

    def __init__(
        self,
        chain: Chain,
        optimizer: OptimizerConfig,
        plan_layout: PlanLayout,
        *,
        total_steps: int,
        gradient_accumulation_steps: int = 1,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
        origins: Origins | None = None,
        communication_dtype: CommunicationDtype = "fp32",
        contrasts_step: bool = False,
    ) -> None:
        """Moves the chain to its device, makes replicas equal, builds the optimizer.

        Args:
            chain: Fresh or loaded, on the CPU.
            optimizer: AdamW or Muon, schedule, clipping.
            plan_layout: Layout of a micro-batch.
            total_steps: Optimizer steps of the stage, for the schedule.
            gradient_accumulation_steps: Micro-batches per optimizer step.
            device: Where the chain runs; the CPU where it is not given.
            group: Replicas; None is the default process group, or this process alone where there is none.
            origins: Where starting values of parameters come from; None: all are random.
            communication_dtype: Type in which gradients are sent between replicas.
            contrasts_step: Whether all micro-batches of a step are contrasted (``engine.hosts.contrast``).
        """
        self.device = device or torch.device("cpu")
        self.chain = chain.to(self.device)
        self.gather: Gather = make_gather(group)
        self._group = group
        self._config = optimizer
        self._plan_layout = plan_layout
        self._total_steps = total_steps
        self._accumulation = gradient_accumulation_steps
        self._groups = parameter_groups(chain, optimizer, origins)
        self._optimizer = ChainOptimizer([group.options for group in self._groups], optimizer)
        self._trained = [parameter for entry in self._groups for parameter in entry.parameters]
        self._averager: _GradientAverager | None = None
        if self.gather.replicas > 1:
            self._averager = _GradientAverager(self._trained, self.gather, group, dtype_of(communication_dtype))
        self._contrast = StepContrast(chain) if contrasts_step else None
        replicas = (group or dist.group.WORLD) if self.gather.replicas > 1 else None
        store = WholeStore(self._optimizer, self._groups, chain, self.device, replicas=replicas)
        self._holdings = Holdings(chain, store, self.gather, group)
        if self.gather.replicas > 1:
            broadcast_together(chain.state_dict().values(), group)

    def step(self, batches: Sequence[Batch], step: int, votes: Votes = no_votes) -> StepResult:
        """Forward and backward over the micro-batches, one optimizer step, ``after_step``."""
        assert len(batches) == self._accumulation, "a step takes gradient_accumulation_steps micro-batches"
        rates = set_learning_rates(self._optimizer, self._groups, self._config.learning_rate(step, self._total_steps))
        collected = StepScalars()
        states = first_states(batches, self._plan_layout, self.device, self.chain, self.gather)
        if self._contrast is not None:
            states = self._contrast.twice(states, partial(self.chain, embeds=True), self.chain.discard_step)
        for first in states:
            state = self.chain(first)
            collected.add(scalars(state))
            loss = state["loss"]
            (loss / self._accumulation if self._accumulation > 1 else loss).backward()
        averages = collected.average(self.gather, self._finish_gradients(), votes())
        norm, skipped = averages.gradient_norm, not averages.are_finite
        if skipped:
            self.chain.discard_step()
        else:
            self._optimizer.step()
            self.chain.after_step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(averages.loss, averages.losses, averages.metrics, norm, rates, skipped, averages.votes)

    def _finish_gradients(self) -> Tensor:
        """Averages gradients over replicas and clips them; returns the norm before clipping."""
        if self._averager is not None:
            self._averager.average_()
        for parameter in self._trained:
            if parameter.grad is None:
                # A missing gradient counts as zero, as in ZeRO's flat buffers: moments and weights still decay.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm: Tensor = nn.utils.get_total_norm(gradients, foreach=True)
        if self._config.gradient_clipping > 0:
            nn.utils.clip_grads_with_norm_(self._trained, self._config.gradient_clipping, norm, foreach=True)
        return norm


class _GradientAverager:
    """One flat buffer for all gradients, so that replicas average them in one collective."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], gather: Gather, group: dist.ProcessGroup | None, sent: torch.dtype
    ) -> None:
        self._parameters = parameters
        self._replicas = gather.replicas
        self._group = group
        self._flat = torch.zeros(
            sum(parameter.numel() for parameter in parameters), dtype=torch.float32, device=parameters[0].device
        )
        self._sent = self._flat if sent == self._flat.dtype else torch.empty_like(self._flat, dtype=sent)
        pieces = torch.split(self._flat, [parameter.numel() for parameter in parameters])
        self._views = [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]

    @torch.no_grad()
    def average_(self) -> None:
        """Replaces every parameter's gradient by its average over replicas; a missing one counts as zero."""
        found = [(view, one.grad) for view, one in zip(self._views, self._parameters, strict=True)]
        copy_together([view for view, own in found if own is not None], [own for _, own in found if own is not None])
        if missing := [view for view, own in found if own is None]:
            torch._foreach_zero_(missing)
        if self._sent is not self._flat:
            self._sent.copy_(self._flat)
        dist.all_reduce(self._sent, group=self._group)
        if self._sent is not self._flat:
            self._flat.copy_(self._sent)
        self._flat /= self._replicas
        for view, parameter in zip(self._views, self._parameters, strict=True):
            parameter.grad = view
