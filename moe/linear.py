"""A linear map whose weights, in fp32 or frozen ones in bf16, are cast to the activations' dtype on use; layer norms.

A map may have a low-rank adapter beside its weight, which is then trained in its place.

Shapes: I inputs, O outputs, M maps of one weight, r rank of an adapter; leading dimensions are free.

There is no autocast: the dtype of the activations alone decides in which precision a product runs. The cast weight is
kept for the backward pass, which takes 2 bytes a weight meanwhile. A host that gathers parameters only while they are
used, as ZeRO-3 does, marks them (``gather_on_use``): for those the backward pass casts the *parameter* again, which the
host frees after the forward pass and gathers again. With kept copies all weights of the model would be in memory
between the two passes.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.stacked import Stacked
from moe.working import is_gathered_on_use, note_use, working

Role = Literal["attention", "cross_attention", "feed_forward"]
"""What a map of a block is for."""
ROLES: tuple[Role, ...] = get_args(Role)


@functools.cache
def _has_fused_bias() -> bool:
    """Whether torch has oneDNN's linear primitive for bf16 on this CPU."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., I] @ weight [O, I].T + bias [O]`` by the fastest kernel; all of one dtype, no gradient.

    On CPUs with bf16 instructions ``F.linear`` copies the bias over the whole result before it multiplies; oneDNN's
    linear primitive adds it when it writes the result, which was measured to be 15 to 25 % faster at 384 x 1536.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() > 0 and _has_fused_bias():
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return fused
    return F.linear(x, weight, bias)


class _CastLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` by ``product``, with parameters of any precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast if keep else weight)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return product(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            # Summed in the low precision's kernel, which accumulates in fp32: sum(dtype=fp32) would copy it all first.
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., I]`` times ``weight [O, I]`` transposed plus ``bias [O]``, computed in ``x.dtype``.

    Where dtypes agree this is ``torch.nn.functional.linear``.
    """
    if torch.compiler.is_compiling():  # the compiler fuses casts and chooses kernels itself
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    keep = not is_gathered_on_use(weight)
    for parameter in (weight, bias):
        if parameter is not None:
            note_use(parameter, x.dtype)
    if keep:
        weight, bias = working(weight, x.dtype), None if bias is None else working(bias, x.dtype)
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.linear(x, weight, bias)
    out: Tensor = _CastLinear.apply(x, weight, bias, keep)  # type: ignore[no-untyped-call]
    return out


class _LinearBeside(torch.autograd.Function):
    """``x @ weight.T + bias``, and ``x`` once more; what comes back for either is added within the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad, grad_beside = grads
        if grad is None:
            return grad_beside, None, None
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            own = weight.to(grad.dtype)
            if grad_beside is None:
                grad_x = (rows @ own).view(x.shape)
            else:
                grad_x = torch.addmm(grad_beside.reshape(-1, x.shape[-1]), rows, own).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def adds_in_products(x: Tensor) -> bool:
    """Whether ``linear_beside`` is more than ``linear``: on accelerators, where there is a gradient to add."""
    return torch.is_grad_enabled() and x.requires_grad and x.device.type != "cpu" and not torch.compiler.is_compiling()


def linear_beside(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``linear``, and ``x`` for whatever else reads it: one kernel less than where autograd adds both gradients up."""
    if not adds_in_products(x):
        return linear(x, weight, bias), x
    for parameter in (weight, bias):
        if parameter is not None:
            note_use(parameter, x.dtype)
    if not is_gathered_on_use(weight):
        weight, bias = working(weight, x.dtype), None if bias is None else working(bias, x.dtype)
    made: tuple[Tensor, Tensor] = _LinearBeside.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made


def _start(weight: Tensor, random: torch.Generator | None = None) -> None:
    """Draws a weight ``[..., I]`` from a normal distribution of deviation ``I ** -0.5`` cut at two deviations."""
    deviation = weight.shape[-1] ** -0.5
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=random)


class Adapter(nn.Module):
    """What a map adds to ``W x + b``: ``alpha / r * B A dropout(x)``, with rank r for each map of its weight.

    ``down`` (A) starts as weights do, ``up`` (B) from zero, so that a new adapter adds nothing. ``scale`` is alpha / r:
    whoever has the tensors knows what to add to the weight (``merged_weight``).

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1, equation 3; dropout as in ``peft``.
    Differs: ``down`` is drawn as weights are; ``peft`` draws it uniformly, with a variance of 1 / (3 I).

    Attributes:
        down: ``[M r, I]``, those of the M maps one above the other.
        up: ``[O, r]``, likewise.
        scale: fp32, no dimension.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, matrices: int, rank: int, alpha: float, dropout: float, seed: int) -> None:
        """Makes an adapter on the device of a weight.

        Args:
            weight: ``[O, I]``.
            matrices: M.
            rank: r.
            alpha: Over r, the factor of what is added.
            dropout: Probability with which an input is dropped in training.
            seed: Of ``down``, which is the same on every machine; torch's own generator is left alone.
        """
        super().__init__()
        (outputs, inputs), device = weight.shape, weight.device
        self.matrices, self.rank, self.dropout = matrices, rank, dropout
        self.down = nn.Parameter(torch.empty(matrices * rank, inputs, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        self.register_buffer("scale", torch.tensor(alpha / rank, dtype=torch.float32, device=device))
        if not weight.is_meta:
            drawn = torch.empty(matrices * rank, inputs, device="cpu")
            _start(drawn, torch.Generator().manual_seed(seed))
            self.down.data.copy_(drawn)

    def stacked(self) -> Iterator[tuple[nn.Parameter, Stacked]]:
        """How matrices lie in the parameters."""
        yield self.down, Stacked(self.matrices)
        yield self.up, Stacked(self.matrices)

    def forward(self, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """What maps ``begin`` to ``end``, by default all, add for ``x [..., I]``; in ``x.dtype``.

        The copies in that dtype are kept for the backward pass, also where parameters are gathered on use: they are
        small.
        """
        x = F.dropout(x, self.dropout, self.training)
        end, outputs = self.matrices if end is None else end, len(self.up) // self.matrices
        down, up = working(self.down, x.dtype), working(self.up, x.dtype)
        if (begin, end) != (0, self.matrices):
            down, up = down[begin * self.rank : end * self.rank], up[begin * outputs : end * outputs]
        # One product for all maps: the zeros between their matrices cost little, as the rank is small.
        if end - begin > 1:
            up = torch.block_diag(*up.chunk(end - begin))  # type: ignore[no-untyped-call]
        return linear(linear(x, down) * self.scale, up)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"rank={self.rank}, matrices={self.matrices}, dropout={self.dropout}"


@torch.no_grad()
def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """The weight ``[O, I]``, fp32, of the map that computes what a weight and its adapter compute together.

    Args:
        weight: ``[O, I]``.
        down: See ``Adapter``, as the others.
        up: See there.
        scale: See there.
    """
    rank = up.shape[1]
    matrices = len(down) // rank
    added = up.float().view(matrices, -1, rank) @ down.float().view(matrices, rank, -1)
    return weight.float() + scale.float() * added.view(weight.shape)


class Linear(nn.Module):
    """``nn.Linear`` with fp32 parameters that follows the dtype of its input.

    Weights start from a normal distribution of standard deviation ``in_features ** -0.5`` cut at two deviations, biases
    from zero.

    Nobody reads ``weight`` to compute with it: that would leave the adapter out. A part of a map is ``part``.

    Source: LeCun et al., Efficient BackProp (1998), section 4.6: outputs vary as much as inputs do.
    Differs: ViT and BERT take 0.02 at every width. At width 192 that is a quarter of this: blocks then add almost
    nothing to their input, and the contrastive embeddings of all samples become equal within 30 steps (docs/log.md).

    Attributes:
        adapter: What is added to the map; None until ``adapt``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, zero: bool = False, matrices: int = 1
    ) -> None:
        """Builds the map.

        Args:
            in_features: I.
            out_features: O.
            bias: Whether there is one.
            zero: Whether weights start from zero.
            matrices: Maps of equal size that lie one above the other in the weight, such as 3 of queries, keys and
                values; 0 where its rows are vectors of their own, such as those of a router's experts. Optimizers that
                work on whole matrices read it, and adapters.
        """
        super().__init__()
        self._stacked = Stacked(matrices)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.adapter: Adapter | None = None
        if zero:
            nn.init.zeros_(self.weight)
        else:
            _start(self.weight)

    def stacked(self) -> Iterator[tuple[nn.Parameter, Stacked]]:
        """How matrices lie in the weight."""
        yield self.weight, self._stacked

    def adapt(self, rank: int, alpha: float, dropout: float, seed: int) -> Adapter:
        """Puts a new adapter beside the weight, and returns it; arguments as those of ``Adapter``."""
        assert self._stacked.count > 0, "rows that are vectors of their own are no matrix of low rank"
        self.adapter = Adapter(self.weight, self._stacked.count, rank, alpha, dropout, seed)
        return self.adapter

    def forward(self, x: Tensor, beside: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Maps ``[..., I]`` to ``[..., O]`` in ``x.dtype``; with ``beside`` returns what ``linear_beside`` does."""
        if beside:
            made, x = linear_beside(x, self.weight, self.bias)
            return (made if self.adapter is None else made + self.adapter(x)), x
        made = linear(x, self.weight, self.bias)
        return made if self.adapter is None else made + self.adapter(x)

    def part(self, x: Tensor, begin: int, end: int) -> Tensor:
        """``forward`` by some of the maps that lie one above the other in the weight: from ``begin`` to ``end``."""
        size = self.out_features // self._stacked.count
        rows = slice(begin * size, end * size)
        made = linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])
        return made if self.adapter is None else made + self.adapter(x, begin, end)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with fp32 parameters, output in the input's dtype."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., D]``; the result has the input's dtype.

        On the CPU bf16 goes through fp32: torch's bf16 kernel adds up the parameters' gradients in bf16, which was off
        by a quarter of their size over 2,368 positions, and was not faster (1.16 ms against 1.07 ms, D = 384).
        """
        if x.dtype != self.weight.dtype and x.device.type == "cpu":
            return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, self.eps).to(
                x.dtype
            )
        weight, bias = working(self.weight, x.dtype), working(self.bias, x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.eps)
