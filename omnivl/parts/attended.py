"""What texts attend to in their pictures: weights of attention, computed once more beside the forward pass.

Kernels return no weights. While somebody listens, hooks compute them anew from the same queries and keys; layers are
not changed and store nothing, and without a listener nothing is computed.

Shapes: R rows, L text positions, S visual positions (class token first), Q query positions, K key positions, H heads,
D = H * head size.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnivl.parts.attention import CrossAttention
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.streams import Stream
from omnivl.parts.unified import UnifiedBlock

_CROSS = inspect.signature(CrossAttention.forward)


@dataclass(frozen=True)
class Attended:
    """The weights of one call of one block, on the CPU.

    Attributes:
        layer: Name of the block.
        num_heads: H, over which the weights are a mean.
        weights: fp32 ``[R, L, S]``: how much each text position attends to each visual one. They add up to 1 where
            texts attend to nothing else (cross-attention), and to less where words are in the same rows. Rows of
            padded text positions have no meaning.
    """

    layer: str
    num_heads: int
    weights: Tensor


def attention_weights(q: Tensor, k: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(head size))``, mean over heads, fp32 ``[R, Q, K]``.

    Args:
        q: ``[R, Q, D]``.
        k: ``[R, K, D]``.
        num_heads: H.
        mask: bool ``[R, K]``, true where a key may be attended to; None for all. Every row needs one true key.
    """
    queries, keys = (x.float().view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k))
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    weights: Tensor = scores.softmax(dim=-1).mean(dim=1)
    return weights


def attends(block: nn.Module) -> bool:
    """Whether ``attending`` hears a block: one of a decoder that looks at patches, or one over words and patches."""
    return isinstance(block, UnifiedBlock) or (isinstance(block, GroundedBlock) and block.sees_patches)


@contextmanager
def attending(blocks: Mapping[str, nn.Module]) -> Iterator[list[Attended]]:
    """Collects what the texts in some blocks attend to until it ends, call by call. For inference alone.

    Blocks that are compiled run as they are written meanwhile, since compiled code calls no hooks.

    Args:
        blocks: Blocks to listen to, by the names that their calls get. A block that does not join texts with visual
            features, or rows that are not joined, give no calls.
    """
    heard: list[Attended] = []
    with ExitStack() as until:
        if any(getattr(one, "_compiled_call_impl", None) is not None for one in blocks.values()):
            until.enter_context(torch.compiler.set_stance("force_eager"))
        for layer, block in blocks.items():
            if isinstance(block, GroundedBlock) and block.sees_patches:
                hook = block.cross.register_forward_hook(_cross_hook(layer, heard), with_kwargs=True)
                until.callback(hook.remove)
            elif isinstance(block, UnifiedBlock):
                hook = block.qkv.register_forward_hook(_joined_hook(layer, heard, block.num_heads))
                until.callback(hook.remove)
        yield heard


def _cross_hook(layer: str, heard: list[Attended]) -> Callable[..., None]:
    @torch.no_grad()
    def hook(module: CrossAttention, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        given = _CROSS.bind(module, *args, **kwargs).arguments
        q, kv, rows, padding, mask = (given.get(name) for name in ("x", "kv", "rows", "padding", "mask"))
        assert q is not None and kv is not None, "its signature says so"
        q = module.q(q)
        q = q if padding is None else padding.restore(q)
        k: Tensor = kv.chunk(2, dim=-1)[0]
        if rows is not None:
            k, mask = k.index_select(0, rows), None if mask is None else mask.index_select(0, rows)
        heard.append(Attended(layer, module.num_heads, attention_weights(q, k, module.num_heads, mask).cpu()))

    return hook


def _joined_hook(layer: str, heard: list[Attended], num_heads: int) -> Callable[..., None]:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple[Any, ...], qkv: Tensor) -> None:
        stream = args[1]
        assert isinstance(stream, Stream), "as projections of blocks are called"
        if not stream.fused:
            return
        length = stream.parts[0].length
        q, k, _values = (qkv if stream.padding is None else stream.padding.restore(qkv)).chunk(3, dim=-1)
        weights = attention_weights(q[:, :length], k, num_heads, stream.mask)[:, :, length:]
        heard.append(Attended(layer, num_heads, weights.cpu()))

    return hook
