"""Dense decoders of language models, by the classes of ``transformers`` that have the same matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from benchmarks.published.counted import Counted, Execution, counted, on_meta


class Head(nn.Module):
    """The last norm, the product with the vocabulary, and the loss."""

    def __init__(self, width: int, words: int, *, upcast: bool) -> None:
        """Has weights.

        Args:
            width: Of the stream.
            words: Of the vocabulary.
            upcast: Whether the loss is computed in fp32.
        """
        super().__init__()
        self.norm, self.words, self.upcast = nn.RMSNorm(width), nn.Linear(width, words, bias=False), upcast

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """``[B, S, D]`` and int64 ``[B * S]`` to the loss."""
        logits = self.words(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float() if self.upcast else logits, labels)


def head(x: Tensor, words: int, *, upcast: bool = True, halved: bool = False) -> Counted:
    """The head behind a stream ``[B, S, D]``: eager, and never recomputed."""
    with on_meta():
        module = Head(x.shape[-1], words, upcast=upcast).to(torch.bfloat16)
        labels = torch.zeros(x.shape[:2].numel(), dtype=torch.int64)
    return counted("head", module, lambda: module(x, labels), halved=halved)


def embedding(x: Tensor, words: int, *, halved: bool = False) -> Counted:
    """The table of words before a stream ``[B, S, D]``."""
    with on_meta():
        table = nn.Embedding(words, x.shape[-1], dtype=torch.bfloat16)
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    return counted("embedding", table, lambda: table(ids), halved=halved)


def llama(
    width: int, inner: int, depth: int, rows: int, length: int, how: Execution, *, halved: bool = False
) -> list[Counted]:
    """Llama 3's blocks with heads of 128, eight of them of keys, and its head of 128,256 words.

    Args:
        width: D.
        inner: Of the feed-forward layers.
        depth: Blocks.
        rows: B.
        length: S.
        how: They run.
        halved: See ``counted``.
    """
    fields: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": width // 128}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128256, "attn_implementation": "sdpa"}
    with on_meta():
        block = LlamaDecoderLayer(LlamaConfig(**fields), 0).to(torch.bfloat16)
        x = torch.zeros(rows, length, width, dtype=torch.bfloat16)
        angles = torch.zeros(1, length, 128, dtype=torch.bfloat16)
    x.requires_grad_()
    made = counted("0", block, lambda: block(x, position_embeddings=(angles, angles)), how, halved=halved)
    return [embedding(x, 128256, halved=halved), *made.repeated(depth), head(x, 128256, halved=halved)]


def opt(width: int, depth: int, heads: int, words: int, rows: int, length: int, how: Execution) -> Sequence[Counted]:
    """OPT's blocks, which have MPT's matrices, with gradients, weights and moments in bf16 as under ``PURE``."""
    fields: dict[str, Any] = {"hidden_size": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    fields |= {"attn_implementation": "sdpa", "activation_function": "gelu", "dropout": 0.0, "attention_dropout": 0.0}
    with on_meta():
        block = OPTDecoderLayer(OPTConfig(**fields), layer_idx=0).to(torch.bfloat16)
        x = torch.zeros(rows, length, width, dtype=torch.bfloat16)
    x.requires_grad_()

    def run() -> Tensor:
        out = block(x)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    return [embedding(x, words), *counted("0", block, run, how).repeated(depth), head(x, words, upcast=False)]
