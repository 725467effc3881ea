"""Parameters of BERT's blocks: our names, and those of transformers' ``BertLayer`` whose rows they concatenate."""

from collections.abc import Mapping

TEXT_BLOCK: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.out": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "ffn.fc1": ("intermediate.dense",),
    "ffn.fc2": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
"""A block that reads texts alone."""
GROUNDED_BLOCK: Mapping[str, tuple[str, ...]] = {
    **TEXT_BLOCK,
    "cross.q": ("crossattention.self.query",),
    "cross.kv": ("crossattention.self.key", "crossattention.self.value"),
    "cross.out": ("crossattention.output.dense",),
    "norm2": ("crossattention.output.LayerNorm",),
    "norm3": ("output.LayerNorm",),
}
"""A block with cross-attention before the feed-forward layer."""
