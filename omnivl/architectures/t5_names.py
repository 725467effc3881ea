"""T5's weights under our names, from those of transformers' ``T5ForConditionalGeneration``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omnivl.architectures.foreign import joined, read_json, refuse_unmet, unmet
from omnivl.parts.sizes import Transformer
from omnivl.parts.t5 import BUCKETS, FARTHEST

_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
TELLING = {"shared.weight", f"encoder.{_TABLE}", f"decoder.{_TABLE}"}
"""Names that the weights of every encoder-decoder of the family have."""
_STACKS = ("encoder", "decoder")
_COPIES = {f"{stack}.embed_tokens.weight" for stack in _STACKS}
"""Copies of ``shared.weight`` in older files."""
_WHOLE = {
    "embed.block.text.words": "shared.weight",
    "embed.block.text.encoder_table": f"encoder.{_TABLE}",
    "embed.block.text.decoder_table": f"decoder.{_TABLE}",
    "fused_norm.block.weight": "encoder.final_layer_norm.weight",
    "losses.vocabulary.decoder.weight": "lm_head.weight",
}


def names(encoder_layers: int, decoder_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the parameters of the class that it concatenates."""
    for ours, theirs in _WHOLE.items():
        yield ours, (theirs,)
    yield f"generation_{decoder_layers - 1:02d}.block.norm_out.weight", ("decoder.final_layer_norm.weight",)
    for stack, prefix, layers in (("encoder", "fused", encoder_layers), ("decoder", "generation", decoder_layers)):
        for index in range(layers):
            own, block = f"{prefix}_{index:02d}.block", f"{stack}.block.{index}"
            attentions = {"attention": ("norm1", "SelfAttention")}
            attentions |= {"cross": ("norm2", "EncDecAttention")} if stack == "decoder" else {}
            for place, (name, (norm, theirs)) in enumerate(attentions.items()):
                layer = f"{block}.layer.{place}"
                yield f"{own}.{norm}.weight", (f"{layer}.layer_norm.weight",)
                for ours, parts in (("q", "q"), ("kv", "kv"), ("out", "o")):
                    yield f"{own}.{name}.{ours}.weight", tuple(f"{layer}.{theirs}.{one}.weight" for one in parts)
            layer = f"{block}.layer.{len(attentions)}"
            yield f"{own}.norm_ffn.weight", (f"{layer}.layer_norm.weight",)
            gated = tuple(f"{layer}.DenseReluDense.{one}.weight" for one in ("wi_0", "wi_1"))
            yield f"{own}.ffn.fc1.weight", gated
            yield f"{own}.ffn.fc2.weight", (f"{layer}.DenseReluDense.wo.weight",)


def from_transformers(
    weights: Mapping[str, Tensor], path: Path, encoder: Transformer, decoder: Transformer, head_size: int
) -> dict[str, Tensor] | None:
    """A checkpoint's tensors under our names; tensors without a counterpart keep theirs.

    Args:
        weights: By the class's names.
        path: The folder or file.
        encoder: Our encoder.
        decoder: Our decoder.
        head_size: Our size of a head.

    Returns:
        None if the weights are not of the family.

    Raises:
        ModelError: Options of ours compute something else.
    """
    if not weights.keys() >= TELLING:
        return None
    said = read_json(path / "config.json") if path.is_dir() else {}
    refuse_unmet(path, _unmet(said, encoder, decoder, head_size))
    given = {name: one for name, one in weights.items() if name not in _COPIES}
    given.setdefault("lm_head.weight", weights["shared.weight"])  # left out where it is the same
    starts = [f"{stack}.block." for stack in _STACKS]
    depths = [1 + max(int(name.split(".")[2]) for name in given if name.startswith(start)) for start in starts]
    found, rest = joined(given, names(*depths))
    return found | rest


def _unmet(said: Mapping[str, Any], encoder: Transformer, decoder: Transformer, head_size: int) -> Iterator[str]:
    """Options that the weights need and shapes do not show, as unfinished messages.

    Args:
        said: Content of ``config.json``; missing fields have the class's defaults. Empty: nothing is known.
        encoder: Our encoder.
        decoder: Our decoder.
        head_size: Our size of a head.
    """
    if not said:
        return
    is_mt5 = said.get("model_type") == "mt5"  # its class has other defaults
    for name, stack in zip(_STACKS, (encoder, decoder), strict=True):
        wanted = {
            "num_heads": said.get("num_heads", 6 if is_mt5 else 8),
            "norm_eps": said.get("layer_norm_epsilon", 1e-6),
        }
        yield from unmet(name, stack, wanted)
    if (got := said.get("d_kv", 64)) != head_size:
        yield f"model.head_size: got {head_size}; allowed {got} with these weights"
    # T5 v1.1's files say by an untied head that states are not scaled before it; newer ones say it by name.
    scales = not is_mt5 and said.get("scale_decoder_outputs", said.get("tie_word_embeddings", True))
    fixed = {
        "feed_forward_proj": (said.get("feed_forward_proj", "gated-gelu" if is_mt5 else "relu"), "gated-gelu"),
        "scale_decoder_outputs": (scales, False),
        "relative_attention_num_buckets": (said.get("relative_attention_num_buckets", BUCKETS), BUCKETS),
        "relative_attention_max_distance": (said.get("relative_attention_max_distance", FARTHEST), FARTHEST),
    }
    for option, (value, allowed) in fixed.items():
        if value != allowed:
            yield f"config.json, {option}: got {value!r}; allowed {allowed!r} in 'pali', whose form is that of T5 v1.1"
