"""A small GIT with transformers' class of its sizes, and a batch for both."""

from dataclasses import replace

import torch
from small_clip import TOKENS, make_batch
from small_clip import run as run_step
from transformers import GitConfig, GitForCausalLM

from omnivl.architectures import GIT
from omnivl.architectures.build import build_chain
from omnivl.objectives import LM, PrepareContext
from omnivl.parts.sizes import Transformer

OBJECTIVES = (LM(label_smoothing=0.0),)
SMALL = GIT(
    vision=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5),
    decoder=Transformer(hidden_size=12, num_heads=3, layers=3, norm="post", norm_eps=1e-12),
    **{"image_size": 16, "num_frames": 3, "patch_size": 8, "text_length": 8, "vocab_size": 50},
)


def peer(config=SMALL, *, moving=False):
    """Transformers' class with random weights, every one away from its tame start, without dropout.

    Args:
        config: Ours.
        moving: Whether frames have embeddings; the class then counts the positions of every frame in its loss.
    """
    torch.manual_seed(1)

    def sizes(stack):
        return {
            "hidden_size": stack.hidden_size,
            "intermediate_size": stack.inner_size,
            "num_hidden_layers": stack.layers,
            "num_attention_heads": stack.num_heads,
            "hidden_act": stack.activation,
            "layer_norm_eps": stack.norm_eps,
        }

    model = GitForCausalLM(
        GitConfig(
            vision_config={**sizes(config.vision), "image_size": 16, "patch_size": 8},
            **sizes(config.decoder),
            **{
                "vocab_size": 50,
                "max_position_embeddings": 8,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 49,
            },
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            num_image_with_embedding=3 if moving else None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def scattered(config=SMALL, objectives=OBJECTIVES):
    """A chain with every weight away from its tame start."""
    torch.manual_seed(0)
    chain = build_chain(config, objectives, TOKENS)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return chain


def git_batch(kind="image_text", objectives=OBJECTIVES, size=4):
    """Pictures or clips and texts, of which the longest fill their rows, and what objectives prepare."""
    batch = make_batch(kind, size)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


def run(chain, batch, objectives=OBJECTIVES):
    """A training step's forward pass."""
    return run_step(chain, objectives, batch)


def inputs(batch):
    """What transformers' class reads of a batch."""
    pixels = batch.frames / 127.5 - 1
    words = batch.token_ids
    return {
        "pixel_values": pixels[:, 0] if batch.num_frames == 1 else pixels,
        "input_ids": words,
        "attention_mask": (words != TOKENS.pad).long(),
        "labels": words.masked_fill(words == TOKENS.pad, -100),
    }
