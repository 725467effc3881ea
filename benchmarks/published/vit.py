"""Images a second that 40 % MFU of one H100 needs of a ViT-B/16: counting alone."""

from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from benchmarks.published.counted import counted, on_meta
from benchmarks.published.table import Row
from engine.estimate.hardware import load_hardware


def rows() -> list[Row]:
    """One."""
    with on_meta():
        fields: dict[str, Any] = {"attn_implementation": "sdpa"}
        model = ViTModel(ViTConfig(**fields), add_pooling_layer=False).bfloat16()
        pixels = torch.zeros(8, 3, 224, 224, dtype=torch.bfloat16)
    made = counted("vit", model, lambda: model(pixel_values=pixels).last_hidden_state)
    useful = 3 * sum(count * one.flops for one, count in made.done.forward.items())
    rate = 0.4 * load_hardware("h100").peak_flops("bf16") / (useful / 8)
    return [Row("ViT-B/16 at 40 % MFU, one H100", "images/s", 3200.0, rate, "counting alone", is_run=False)]
