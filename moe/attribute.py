"""Experts that are chosen by the kind of a token, not by the token (attribute routing): perceptrons and linear maps.

Shapes: T tokens, D hidden size, F inner size, E experts, K choices, A distinct sets of attributes, B bits of each, I
inputs and O outputs of a linear map.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe.config import AttributeConfig
from moe.experts.bank import ExpertBank
from moe.experts.products import perceptron
from moe.linear import Linear, linear
from moe.slot import FeedForwardOutput
from moe.tokens import Tokens


class AttributeGated(nn.Module):
    """Gate of all experts by attributes: ``g = softmax(W_g LN(W_a a) + noise)``, the K largest renormalised.

    Source: Zhu et al., Uni-Perceiver-MoE, arXiv 2206.04674, section 3.2 (attribute routing).
    """

    def __init__(self, config: AttributeConfig) -> None:
        super().__init__()
        self.top_k, self.noise = config.top_k, config.noise / config.num_experts
        self.embed = Linear(config.num_attributes, config.attribute_size, matrices=0)
        self.norm = nn.LayerNorm(config.attribute_size)
        self.gate = Linear(config.attribute_size, config.num_experts, bias=False, matrices=0)

    def choose(self, attributes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The experts int64 ``[A, K]`` of each set of attributes, best first, and their weights fp32 ``[A, K]``."""
        bits_AB = torch.tensor(attributes, dtype=torch.float32).to(self.gate.weight.device)
        logits_AE = self.gate(self.norm(self.embed(bits_AB)))
        if self.training and self.noise > 0:
            logits_AE = logits_AE + self.noise * torch.randn_like(logits_AE)
        gate_AK, expert_AK = logits_AE.softmax(-1).topk(self.top_k, dim=-1)
        return expert_AK, gate_AK / gate_AK.sum(-1, keepdim=True)


class AttributeFeedForward(AttributeGated):
    """The feed-forward slot with perceptrons by attributes.

    All tokens of equal attributes a go to the same K experts with the same weights. A weighted sum of perceptrons is
    one perceptron K times as wide, so that no tokens are dispatched: for each set of attributes the K experts are
    concatenated, with the weights multiplied into their second matrices.

    Source: Zhu et al., Uni-Perceiver-MoE, arXiv 2206.04674, section 3.2 (attribute routing).
    Differs: the merged perceptron is used in training too; the paper merges experts for inference.
    """

    def __init__(self, config: AttributeConfig, hidden_size: int, inner_size: int) -> None:
        """Builds gate and experts.

        Args:
            config: Sizes and choices.
            hidden_size: D.
            inner_size: F of one expert.
        """
        super().__init__(config)
        self.experts = ExpertBank(config.num_experts, hidden_size, inner_size)

    def merged(self, expert_K: Tensor, gate_K: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One perceptron made of K experts: weights ``[K F, D]`` and biases ``[K F]``, ``[K F, D]`` and ``[D]``."""
        bank = self.experts
        w1, b1, w2, b2 = (
            one.index_select(0, expert_K) for one in (bank.fc1_weight, bank.fc1_bias, bank.fc2_weight, bank.fc2_bias)
        )
        return w1.flatten(0, 1), b1.flatten(), (w2 * gate_K[:, None, None]).flatten(0, 1), gate_K @ b2

    def forward(self, x: Tensor, tokens: Tokens) -> FeedForwardOutput:
        """Maps ``x [..., D]`` to the same shape, a set of attributes at a time."""
        kinds = list(dict.fromkeys(segment.attributes for segment in tokens.segments))
        expert_AK, gate_AK = self.choose(kinds)
        perceptrons = dict(zip(kinds, map(self.merged, expert_AK, gate_AK), strict=True))
        parts = torch.split(x.reshape(-1, x.shape[-1]), [segment.length for segment in tokens.segments])
        made = []
        for segment, part in zip(tokens.segments, parts, strict=True):
            made.append(perceptron(part, *perceptrons[segment.attributes]))
        return FeedForwardOutput((made[0] if len(made) == 1 else torch.cat(made)).view(x.shape))


class AttributeLinear(AttributeGated):
    """A linear map by attributes: the weighted sum of K linear maps is one of the same size.

    Source: Zhu et al., Uni-Perceiver-MoE, arXiv 2206.04674, section 3.2 (experts in attention projections).
    Differs: merged in training too, as ``AttributeFeedForward``.
    """

    def __init__(self, config: AttributeConfig, in_features: int, out_features: int) -> None:
        """Builds gate and experts.

        Args:
            config: Sizes and choices.
            in_features: I.
            out_features: O.
        """
        super().__init__(config)
        self.experts = LinearBank(config.num_experts, in_features, out_features)

    def forward(self, parts: Sequence[Tensor], attributes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Maps each part ``[..., I]`` to ``[..., O]`` by the map of its attributes."""
        kinds = list(dict.fromkeys(attributes))
        maps = dict(zip(kinds, map(self.merged, *self.choose(kinds)), strict=True))
        return [linear(part, *maps[kind]) for part, kind in zip(parts, attributes, strict=True)]

    def merged(self, expert_K: Tensor, gate_K: Tensor) -> tuple[Tensor, Tensor]:
        """One map made of K experts: weight ``[O, I]`` and bias ``[O]``."""
        weight_KOI, bias_KO = (one.index_select(0, expert_K) for one in (self.experts.weight, self.experts.bias))
        return torch.einsum("k,koi->oi", gate_K, weight_KOI), gate_K @ bias_KO


class LinearBank(nn.Module):
    """E linear maps of one shape. Each starts as ``moe.linear.Linear`` does."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))
        deviation = in_features**-0.5
        nn.init.trunc_normal_(self.weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The biases, which weight decay leaves out."""
        yield self.bias
