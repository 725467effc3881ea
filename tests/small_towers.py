"""A small model and what comparisons of it with transformers' classes share."""

from dataclasses import replace

import torch

from omnivl.architectures import OmniVL
from omnivl.data.special_tokens import SpecialTokens

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
CONFIG = replace(
    OmniVL.presets["tiny"],
    text_norm="post",
    hidden_size=16,
    num_heads=2,
    vision_layers=2,
    text_layers=2,
    image_size=16,
    video_size=16,
    num_frames=3,
    patch_size=8,
    text_length=6,
    vocab_size=50,
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def scattered(model):
    """Every weight away from its tame start, biases too."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def encoders(chain, state):
    """The chain up to the projections."""
    for layer in chain.layers:
        if type(layer).__name__ == "Project":
            return state
        state = layer(state)
    raise AssertionError("no projections")
