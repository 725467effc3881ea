"""Named model sizes."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from omnivl.errors import ModelError
from omnivl.model.config import ModelConfig, PresetName

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
        recompute=True,
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


def check_config(config: ModelConfig) -> None:
    """Refuses sizes that do not fit together, all of them at once.

    Raises:
        ModelError: One line per misfit.
    """
    misfits = []
    if config.hidden_size % config.num_heads:
        misfits.append(
            f"model.hidden_size: {config.hidden_size} is no multiple of num_heads {config.num_heads}; change either"
        )
    for name in ("image_size", "video_size"):
        if getattr(config, name) % config.patch_size:
            misfits.append(
                f"model.{name}: {getattr(config, name)} is no multiple of patch_size {config.patch_size}; change either"
            )
    if not 0.0 <= config.patch_dropout < 1.0:
        misfits.append(f"model.patch_dropout: {config.patch_dropout} is no share; allowed: at least 0 and below 1")
    if config.num_frames % config.tubelet_size:
        misfits.append(
            f"model.num_frames: {config.num_frames} is no multiple of tubelet_size {config.tubelet_size}; change either"
        )
    if misfits:
        raise ModelError("\n".join(misfits))


def _unknown(where: str, got: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(got, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where}: {got!r} is not known; allowed: {', '.join(allowed)}{hint}"
