"""Decoder blocks with routed experts, as one process of expert parallelism computes them, 4,096 positions a row.

Shapes: B rows of a micro-batch, S positions, D width, E own experts of a process, I inner size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published.counted import Counted, Execution, counted, on_meta
from engine.estimate.operations import OperationCounter, Operations, weighted

LENGTH = 4096
"""S."""


@dataclass(frozen=True)
class Sizes:
    """Of a model.

    Attributes:
        width: D.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_size: Of a head.
        inner: I.
        experts: Of a layer.
        top_k: Experts of a token.
        words: Of the vocabulary.
        depth: Blocks.
        biases: Whether experts and products of attention have biases.
        head_norms: Whether queries and keys are normed, head by head.
        joined_rotation: Whether one kernel rotates queries, and one keys.
    """

    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    experts: int
    top_k: int
    words: int
    depth: int
    biases: bool = False
    head_norms: bool = False
    joined_rotation: bool = True


class RoutedBlock(nn.Module):
    """A decoder block with routed experts, as one process of expert parallelism computes it.

    As many rows come to its own experts as it sends away. Rotations of heads are one kernel in GPT-OSS.
    """

    def __init__(self, sizes: Sizes, own: int) -> None:
        """Has weights.

        Args:
            sizes: Of the model.
            own: E.
        """
        super().__init__()
        self.sizes, self.own = sizes, own
        width, biases = sizes.width, sizes.biases
        self.norms = nn.ModuleList(_norm(width) for _ in range(2))
        self.head_norms = nn.ModuleList(_norm(sizes.head_size) for _ in range(2 * sizes.head_norms))
        counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        self.q, self.k, self.v = (nn.Linear(width, count * sizes.head_size, bias=biases) for count in counts)
        self.out = nn.Linear(sizes.heads * sizes.head_size, width, bias=biases)
        self.router = nn.Linear(width, sizes.experts, bias=biases)
        self.up = nn.Parameter(torch.empty(own, width, 2 * sizes.inner))
        self.down = nn.Parameter(torch.empty(own, sizes.inner, width))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """``[B, S, D]`` and ``[S, head_size]`` to ``[B, S, D]``."""
        x = x + self._attended(self.norms[0](x), angles)
        tokens, top_k = self.norms[1](x).flatten(0, 1), self.sizes.top_k
        gates = self.router(tokens).float().softmax(-1).to(x.dtype)[:, :top_k]
        arrived = tokens[:, None].expand(-1, top_k, -1).reshape(self.own, -1, self.sizes.width)
        # One kernel joins and weighs the halves: it moves what a gated linear unit moves.
        back = torch.bmm(F.glu(torch.bmm(arrived, self.up)), self.down).view(-1, top_k, self.sizes.width)
        out = torch.addcmul(x.flatten(0, 1), back.sum(1), gates.sum(1, keepdim=True))
        return out.view_as(x)

    def _attended(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, length, _ = x.shape
        maps, shape = (self.q, self.k, self.v), (batch, length, -1, self.sizes.head_size)
        q, k, v = (one(x).view(shape).transpose(1, 2) for one in maps)
        if self.head_norms:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        q, k = (one * angles if self.sizes.joined_rotation else one * angles + one.flip(-1) * angles for one in (q, k))
        k, v = (one.repeat_interleave(self.sizes.heads // self.sizes.kv_heads, 1) for one in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return made


def _norm(width: int) -> nn.LayerNorm:
    """One kernel, which moves what a norm of Transformer Engine moves."""
    return nn.LayerNorm(width, bias=False)


def bias_operations(sizes: Sizes, own: int, rows: int) -> tuple[Operations, Operations]:
    """What adding biases to the rows of each expert takes: cut, added one by one, joined; forward and backward."""
    found: tuple[list[Operations], list[Operations]] = [], []
    for columns, weighed in ((2 * sizes.inner, False), (sizes.width, True)):
        with on_meta():
            value = torch.zeros(rows, columns, dtype=torch.bfloat16).requires_grad_()
            bias = torch.zeros(own, columns, dtype=torch.bfloat16).requires_grad_()
            shares = torch.zeros(rows, 1, dtype=torch.bfloat16)
        forward, backward = OperationCounter(), OperationCounter()
        each = rows // own
        with forward:
            parts = zip(torch.split(value, each), bias, torch.split(shares, each), strict=True)
            out = torch.cat([part + (one * share if weighed else one) for part, one, share in parts])
        with backward:
            torch.autograd.backward([out], [torch.ones_like(out)])
        found[0].append(forward.found)
        found[1].append(backward.found)
    done, undone = (weighted(*((one, 1.0) for one in direction)) for direction in found)
    return done, undone


def routed_block(sizes: Sizes, over: int, batch: int, how: Execution, *, copies: int) -> Counted:
    """A block on one process.

    Args:
        sizes: Of the model.
        over: Processes over which experts are split.
        batch: B.
        how: It runs.
        copies: Of a token's row that are sent away.
    """
    own = sizes.experts // over
    with on_meta():
        block = RoutedBlock(sizes, own).bfloat16()
        x = torch.zeros(batch, LENGTH, sizes.width, dtype=torch.bfloat16)
        angles = torch.zeros(LENGTH, sizes.head_size, dtype=torch.bfloat16)
    x.requires_grad_()
    made = counted("0", block, lambda: block(x, angles), how)
    sent = 2.0 * copies * batch * LENGTH * sizes.width
    options: dict[str, Any] = {"routed": sent * (2 if how.recomputed == "blocks" else 1), "routed_gradient": sent}
    if sizes.biases:
        forward, backward = bias_operations(sizes, own, batch * LENGTH * sizes.top_k)
        options["forward"] = weighted((made.done.forward, 1.0), (forward, 1.0))
        options["backward"] = weighted((made.done.backward, 1.0), (backward, 1.0))
    done = replace(made.done, **options, reordered=0.0)  # copies into the experts' order are counted in the block
    banks = over * sum(one.numel() for one in (block.up, block.down))
    own_banks = banks // over
    trained = made.size.trained - own_banks + banks
    return Counted(done, replace(made.size, trained=trained, experts=banks, cast=trained - banks, cast_experts=banks))
