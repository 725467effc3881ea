"""A bank of experts: E feed-forward layers of one shape, each on its own rows.

Shapes: E experts, D hidden size, F inner size, N rows in the experts' order.
"""

import torch
from torch import Tensor, nn

from moe.expert_products import Implementation, expert_feed_forward
from moe.gradient_memory import GradientMemory


class ExpertBank(nn.Module):
    """E two-layer perceptrons ``fc2(gelu(fc1(x)))``.

    Both matrices of an expert are stored as ``[F, D]``, inner by hidden, in which a CPU is quickest with them
    (``expert_products``): ``fc1_weight[e]`` is what ``nn.Linear`` has, ``fc2_weight[e]`` its transpose.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, *, implementation: Implementation = "auto"
    ) -> None:
        super().__init__()
        self.num_experts, self.implementation = num_experts, implementation
        self._memory = GradientMemory()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, inner_size))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, inner_size, hidden_size))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))
        for weight, inputs in ((self.fc1_weight, hidden_size), (self.fc2_weight, inner_size)):
            deviation = inputs**-0.5  # as moe.linear.Linear starts
            nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def forward(self, rows_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """What each expert makes of its rows, ``[N, D]`` in the dtype of the rows.

        Args:
            rows_ND: Rows expert by expert; those behind the last expert's are left over and mean nothing.
            tokens_per_expert_E: int64, rows of each expert.
        """
        weights = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        how: Implementation = self.implementation
        return expert_feed_forward(rows_ND, tokens_per_expert_E, *weights, implementation=how, memory=self._memory)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{self.num_experts} experts, {self.fc1_weight.shape[2]} x {self.fc1_weight.shape[1]}"
