"""Named model sizes."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from moe.config import (
    AttributeConfig,
    DenseConfig,
    FeedForwardConfig,
    MoMEConfig,
    MoMELIMoEConfig,
    SparseConfig,
    named_modalities,
)
from omnivl.errors import ModelError, did_you_mean
from omnivl.parts.config import MODALITIES, ModelConfig, PresetName, VisionConfig

PRESETS: Mapping[PresetName, ModelConfig] = {
    "tiny": ModelConfig(
        hidden_size=192,
        num_heads=3,
        vision_layers=6,
        text_layers=4,
        alignment_layers=2,
        generation_layers=2,
        image_size=64,
        video_size=64,
        num_frames=8,
        patch_size=8,
        text_length=16,
        vocab_size=4096,
        projection_size=128,
        text_norm="pre",
    ),
    "small": ModelConfig(
        hidden_size=384,
        num_heads=6,
        vision_layers=12,
        text_layers=6,
        alignment_layers=3,
        generation_layers=3,
        image_size=96,
        video_size=96,
        num_frames=8,
        patch_size=16,
        text_length=32,
        projection_size=256,
    ),
    "base": ModelConfig(),
    "large": ModelConfig(
        hidden_size=1024, num_heads=16, vision_layers=24, text_layers=12, alignment_layers=12, generation_layers=12
    ),
    # ViT-g of EVA and BEiT-3: 1408 wide, 40 layers, 16 heads, 6144 inner.
    "giant": ModelConfig(
        hidden_size=1408,
        num_heads=16,
        mlp_ratio=6144 / 1408,
        vision_layers=40,
        text_layers=24,
        alignment_layers=12,
        generation_layers=12,
        patch_size=14,
        recompute="block",
    ),
}
"""``tiny`` is the quickstart's, ``base`` the paper's. The vocabulary size is the tokenizer's and is set by the plan."""


def resolve(preset: str, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a preset with some fields set anew.

    Args:
        preset: Name of a preset.
        overrides: Fields of ``ModelConfig`` by name, already of their final types.

    Raises:
        ModelError: No such preset or field, or sizes that do not fit together.
    """
    if preset not in PRESETS:
        raise ModelError(_unknown("model.preset", preset, list(PRESETS)))
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in overrides or {}:
        if name not in fields:
            raise ModelError(_unknown("model", name, fields))
    config = dataclasses.replace(PRESETS[cast(PresetName, preset)], **dict(overrides or {}))
    check_config(config)
    return config


@dataclass(frozen=True)
class Misfit:
    """Something in a configuration that does not fit to the rest of it.

    Attributes:
        path: The field, from the model on.
        got: What stands there.
        allowed: What may stand there.
        change: What to do about it.
    """

    path: tuple[str, ...]
    got: str
    allowed: str
    change: str

    def __str__(self) -> str:
        return f"{'.'.join(('model', *self.path))}: got {self.got}; allowed {self.allowed}; {self.change}"


def check_config(config: ModelConfig) -> None:
    """Refuses sizes that do not fit together, all of them at once.

    Raises:
        ModelError: One line per misfit.
    """
    found = list(misfits(config))
    if found:
        raise ModelError("\n".join(map(str, found)))


def misfits(config: ModelConfig) -> Iterator[Misfit]:
    """What does not fit together in a configuration."""
    for name, divisor in (
        ("hidden_size", "num_heads"),
        ("image_size", "patch_size"),
        ("video_size", "patch_size"),
        ("num_frames", "tubelet_size"),
    ):
        value, by = getattr(config, name), getattr(config, divisor)
        if value % by:
            yield Misfit((name,), str(value), f"a multiple of {divisor} {by}", "change either")
    if config.inner_size < 1:
        yield Misfit(("mlp_ratio",), f"{config.mlp_ratio:g}", "1 / hidden_size or more", "raise it, e.g. to 4")
    yield from _vision_misfits(config)
    yield from _modality_misfits(config.ffn)
    yield from _place_misfits(config)
    yield from _attention_misfits(config)


def _vision_misfits(config: ModelConfig) -> Iterator[Misfit]:
    """Details of the visual encoder where there is none, or where something else stands against them."""
    vision, defaults = config.vision, VisionConfig()
    if config.architecture == "unified":
        for entry in dataclasses.fields(vision):
            value, default = getattr(vision, entry.name), getattr(defaults, entry.name)
            if value != default:
                change = "leave it out, or set model.architecture to towers"
                yield Misfit(("vision", entry.name), f"{value!r} in unified", f"{default!r} in unified", change)
    if vision.activation != "gelu" and not isinstance(config.ffn, DenseConfig | MoMEConfig):
        got = f"{vision.activation!r} with ffn kind {config.ffn.kind!r}"
        allowed = "'gelu' where there are sparse or attribute experts"
        yield Misfit(("vision", "activation"), got, allowed, "set it to 'gelu', or model.ffn.kind to 'dense' or 'mome'")
    if vision.relative_positions and config.patch_dropout > 0:
        got = f"true with patch_dropout {config.patch_dropout:g}"
        yield Misfit(("vision", "relative_positions"), got, "false, or true with patch_dropout 0", "change either")


def _modality_misfits(ffn: FeedForwardConfig) -> Iterator[Misfit]:
    known = ", ".join(map(repr, MODALITIES))
    for field, names in named_modalities(ffn).items():
        for name in names:
            if name not in MODALITIES:
                change = did_you_mean(name, MODALITIES, "choose one of these")
                yield Misfit(("ffn", *field.split(".")), repr(name), known, change)
    if isinstance(ffn, MoMELIMoEConfig) and ffn.common_experts < ffn.router.fewest_experts:
        for name in MODALITIES:
            if name not in ffn.pools:
                got = f"no pool for {name} and {ffn.common_experts} common experts"
                allowed = f"{ffn.router.fewest_experts} or more, as many as a token needs"
                yield Misfit(("ffn", "pools"), got, allowed, "give it a pool or raise common_experts")


def _attention_misfits(config: ModelConfig) -> Iterator[Misfit]:
    """Experts of attention projections where projections belong to a tower or to a modality."""
    if isinstance(config.ffn, AttributeConfig) and config.ffn.attention:
        if config.architecture == "towers":
            got, change = "true in towers", "set it to false, or model.architecture to unified"
            yield Misfit(("ffn", "attention"), got, "false in towers", change)
        elif config.multiway:
            got, change = "true beside multiway", "set one of the two to false"
            yield Misfit(("ffn", "attention"), got, "one of the two", change)


def _place_misfits(config: ModelConfig) -> Iterator[Misfit]:
    """Blocks that are named as places of experts and that not every stack has."""
    blocks = config.ffn.blocks if isinstance(config.ffn, SparseConfig | AttributeConfig) else None
    stacks = {"vision_layers": config.vision_layers}
    if config.architecture == "towers":
        stacks |= {name: getattr(config, name) for name in ("text_layers", "alignment_layers", "generation_layers")}
    shortest = min(stacks, key=lambda name: stacks[name])
    depth = stacks[shortest]
    for block in blocks or ():
        if not -depth <= block < depth:
            allowed = f"{-depth} to {depth - 1}, the blocks of {depth} {shortest}"
            yield Misfit(("ffn", "blocks"), str(block), allowed, "name another block or build more")
    if blocks is not None and len({block % depth for block in blocks}) < len(blocks):
        got = f"{list(blocks)} with {depth} {shortest}"
        yield Misfit(("ffn", "blocks"), got, "each block once", "take out those that are named from both ends")


def _unknown(where: str, got: str, allowed: list[str]) -> str:
    change = did_you_mean(got, allowed, "choose one of these")
    return f"{where}: {got!r} is not known; allowed: {', '.join(allowed)}; {change}"
