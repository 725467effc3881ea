"""A small CLIP of two widths, the same as transformers' class, and a batch for both."""

from dataclasses import replace

import torch
from transformers import CLIPConfig, CLIPModel

from omnivl.architectures import CLIP
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind
from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.sizes import Transformer

TOKENS = SpecialTokens(pad=0, cls=1, sep=49, mask=2, decode=3, vocab_size=50, num_reserved=4)
SMALL = CLIP(
    vision=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5),
    text=Transformer(hidden_size=12, num_heads=3, layers=3, mlp_ratio=3.0, norm_eps=1e-5),
    **{"image_size": 16, "num_frames": 3, "patch_size": 8, "text_length": 8, "vocab_size": 50, "projection_size": 10},
)


def with_activation(activation: str) -> CLIP:
    """The small model with one activation in both towers."""
    towers = {"vision": SMALL.vision, "text": SMALL.text}
    return replace(SMALL, **{name: replace(tower, activation=activation) for name, tower in towers.items()})


def scattered_chain(config: CLIP, objectives: tuple[Objective, ...], seed: int = 0) -> Chain:
    """A chain with every weight away from its tame start."""
    torch.manual_seed(seed)
    chain = build_chain(config, objectives, TOKENS)
    for name, parameter in chain.named_parameters():
        if parameter.requires_grad and "logit_scale" not in name and not name.startswith("losses"):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return chain


def theirs(activation: str) -> CLIPModel:
    """transformers' class of the same sizes, with random weights."""
    shared = {"hidden_act": activation, "projection_dim": 10}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 12, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 49}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, **shared, **ends, "vocab_size": 50, "max_position_embeddings": 8},
            vision_config={**vision, **shared, "image_size": 16, "patch_size": 8},
            projection_dim=10,
        )
    )
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def make_batch(kind: DataKind = "image_text", size: int = 4, pad: int = TOKENS.pad) -> Batch:
    """Noise, and texts of 1 to 6 words, of which the longest fill their rows."""
    random = torch.Generator().manual_seed(2)
    times = SMALL.num_frames if kind.startswith("video") else 1
    frames = torch.randint(0, 256, (size, times, 3, 16, 16), generator=random, dtype=torch.uint8)
    token_ids = torch.randint(4, 49, (size, 8), generator=random)
    token_ids[:, 0] = TOKENS.cls
    for row in range(size):
        end = 7 - row * 5 % 6
        token_ids[row, end], token_ids[row, end + 1 :] = TOKENS.sep, pad
    own = torch.arange(size)
    return Batch(kind, frames, token_ids, own, own, own)


def run(chain: Chain, objectives: tuple[Objective, ...], batch: Batch) -> State:
    """A training step's forward pass."""
    return chain(State.from_batch(batch, plan_layout(objectives, batch.kind, batch.size, batch.num_frames)))
