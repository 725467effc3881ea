"""A bank of experts: E feed-forward layers of one shape, each on its own rows.

The bank may be split over the processes of an expert-parallel group. Every process then holds some of the experts, and
rows are sent to them and back.

Shapes: E experts, D hidden size, F inner size, N rows in the experts' order, P parts of the bank.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dispatch.by_token import Routing, arrange, combine, dispatch
from moe.experts.exchange import ExpertExchange
from moe.experts.gradient_memory import GradientMemory
from moe.experts.products import Implementation, expert_feed_forward
from moe.stacked import Stacked


class ExpertBank(nn.Module):
    """E two-layer perceptrons ``fc2(gelu(fc1(x)))``.

    Both matrices of an expert are stored as ``[F, D]``, inner by hidden, in which a CPU multiplies
    fastest (``moe.experts.products``): ``fc1_weight[e]`` is what ``nn.Linear`` has, ``fc2_weight[e]`` its transpose.

    Attributes:
        num_experts: E, on all processes together.
        exchange: Exchanges rows with the other parts of a split bank; None if all experts are in this process.
    """

    exchange: ExpertExchange | None

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, *, implementation: Implementation = "auto"
    ) -> None:
        super().__init__()
        self.num_experts, self.implementation = num_experts, implementation
        self.hidden_size, self.inner_size = hidden_size, inner_size
        self.exchange = None
        self._memory = GradientMemory()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, inner_size))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))
        for weight, inputs in ((self.fc1_weight, hidden_size), (self.fc2_weight, inner_size)):
            deviation = inputs**-0.5  # as moe.linear.Linear starts
            nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    @property
    def own(self) -> slice:
        """Which of the E experts this process has."""
        if self.exchange is None:
            return slice(0, self.num_experts)
        here = self.num_experts // self.exchange.parts
        return slice(self.exchange.part * here, (self.exchange.part + 1) * here)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The biases, which weight decay leaves out."""
        yield from (self.fc1_bias, self.fc2_bias)

    def stacked(self) -> Iterator[tuple[nn.Parameter, Stacked]]:
        """The second matrix of each expert is stored transposed."""
        yield self.fc2_weight, Stacked(transposed=True)

    @torch.no_grad()
    def cut(self, exchange: ExpertExchange) -> None:
        """Drops all experts but this process' part. The parameters stay the same objects.

        Args:
            exchange: The exchange with the other parts, whose processes hold the same whole bank before the call.
        """
        assert self.exchange is None, "the bank is cut already"
        assert self.num_experts % exchange.parts == 0, f"{self.num_experts} experts for {exchange.parts} parts"
        self.exchange = exchange
        for parameter in self.parameters():
            parameter.data = parameter[self.own].clone()

    def forward(
        self, rows_ND: Tensor, tokens_per_expert_E: Tensor, meanwhile: Callable[[], None] | None = None
    ) -> Tensor:
        """Applies each expert to its rows; returns ``[N, D]`` in the dtype of the rows.

        Args:
            rows_ND: Rows expert by expert. Rows after those of the last expert belong to none and are not read.
            tokens_per_expert_E: int64, rows of each expert.
            meanwhile: Called once: while rows travel to their experts, or after these where none travel.
        """
        if self.exchange is None:
            served_ND = self._serve(rows_ND, tokens_per_expert_E)
            if meanwhile is not None:
                meanwhile()
            return served_ND
        there_PE = tokens_per_expert_E.view(self.exchange.parts, -1)
        here_PE = self.exchange.trade_counts(there_PE)
        sent, received = torch.stack([there_PE.sum(1), here_PE.sum(1)]).tolist()  # the host waits once
        arrives = self.exchange.start_rows(rows_ND[: sum(sent)], sent, received)
        if meanwhile is not None:
            meanwhile()
        by_expert = _by_expert(here_PE, sum(received))
        arrived_ND = arrives()
        made_ND = self._serve(dispatch(arrived_ND, by_expert), by_expert.tokens_per_expert_E)
        back_ND = self.exchange.start_rows(combine(made_ND, None, by_expert), received, sent)()
        return F.pad(back_ND, (0, 0, 0, len(rows_ND) - len(back_ND)))

    def _serve(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """Applies this process' experts to their rows."""
        weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        how: Implementation = self.implementation
        return expert_feed_forward(rows_ND, tokens_per_expert_E, *weights, implementation=how, memory=self._memory)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{self.num_experts} experts, {self.hidden_size} x {self.inner_size}"


def _by_expert(counts_PE: Tensor, rows: int) -> Routing:
    """From ``rows`` rows ordered by part, and by expert within each part, to rows ordered by expert."""
    parts, experts = counts_PE.shape
    run_N = torch.arange(experts, device=counts_PE.device).repeat(parts)
    expert_N = run_N.repeat_interleave(counts_PE.flatten(), output_size=rows)
    return arrange(expert_N[:, None], experts)
