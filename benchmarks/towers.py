"""The training step of the ``small`` towers against the same towers made of ``transformers`` classes.

python -m benchmarks.towers

ViT-S/16 at 96 px and a BERT-like text encoder of 6 layers, 384 wide, 64 pairs of 32 tokens (on a GPU 512 pairs), bf16,
forward and backward of a contrastive loss, with the peer's default attention (``sdpa``) and with its ``eager`` one.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks.measure import Ratio, Step, over, rates, take_turns
from benchmarks.record import Options, Report, Table, main_of
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import UniVLC

TEXT_LENGTH = 32
AT_LEAST = {("cpu", "default"): 1.4, ("cpu", "eager"): 1.1, ("cuda", "default"): 1.2}
"""Least speed over the peer, by type of device and the peer's attention."""


class PeerTowers(nn.Module):
    """Two towers of ``transformers`` classes with a plain contrastive loss on their class tokens."""

    def __init__(self, config: OmniVL, attention: str) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.inner_size,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        vit = ViTConfig(
            num_hidden_layers=config.vision_layers, image_size=config.image_size, patch_size=config.patch_size, **sizes
        )
        bert = BertConfig(num_hidden_layers=config.text_layers, vocab_size=config.vocab_size, **sizes)
        vit._attn_implementation = bert._attn_implementation = attention
        self.visual = ViTModel(vit, add_pooling_layer=False)
        self.text = BertModel(bert, add_pooling_layer=False)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_size)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, frames: Tensor, token_ids: Tensor) -> Tensor:
        """The loss of frames uint8 ``[B, 1, 3, H, W]`` and texts ``[B, L]``."""
        pixels = (frames[:, 0].float() / 127.5 - 1.0).to(self.visual_projection.weight.dtype)
        visual = self.visual_projection(self.visual(pixels).last_hidden_state[:, 0]).float()
        text = self.text(token_ids, attention_mask=(token_ids != 0).long()).last_hidden_state[:, 0]
        text = self.text_projection(text).float()
        logits = F.normalize(visual, dim=-1) @ F.normalize(text, dim=-1).t() / 0.07
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def peer_step(config: OmniVL, attention: str, batch: Batch) -> Step:
    """One step of the peer, all weights and activations in bf16."""
    model = PeerTowers(config, attention).to(device=batch.position.device, dtype=torch.bfloat16).train()

    def step() -> None:
        model(batch.frames, batch.token_ids).backward()
        model.zero_grad(set_to_none=True)

    return step


def our_step(config: OmniVL, batch: Batch) -> Step:
    """One step of the chain, fp32 weights and bf16 activations."""
    objectives = [UniVLC(queue_size=0, batch_keys="online")]
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=config.vocab_size, num_reserved=5)
    chain = build_chain(config, objectives, tokens, compute_dtype=torch.bfloat16).to(batch.position.device).train()
    layout = plan_layout(objectives, batch.kind, batch.size, batch.num_frames)

    def step() -> None:
        chain(State.from_batch(batch, layout))["loss"].backward()
        chain.zero_grad(set_to_none=True)

    return step


def make_batch(config: OmniVL, size: int, device: torch.device) -> Batch:
    """A batch of noise; texts are between a quarter and the whole of the length."""
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (size, 1, 3, config.image_size, config.image_size), generator=draw)
    token_ids = torch.randint(5, config.vocab_size, (size, TEXT_LENGTH), generator=draw)
    lengths = torch.randint(TEXT_LENGTH // 4, TEXT_LENGTH + 1, (size, 1), generator=draw)
    token_ids = torch.where(torch.arange(TEXT_LENGTH) < lengths, token_ids, 0)
    own = torch.arange(size, device=device)
    return Batch("image_text", frames.to(torch.uint8).to(device), token_ids.to(device), own, own, own)


def run(options: Options) -> Report:
    """Times the three in turns."""
    pairs = 16 if options.quick else 512 if options.device.type == "cuda" else 64
    rounds = 2 if options.quick else 15
    config = replace(
        OmniVL.presets["small"], alignment_layers=0, generation_layers=0, momentum=None, text_length=TEXT_LENGTH
    )
    batch = make_batch(config, pairs, options.device)
    steps = {
        "omnivl": our_step(config, batch),
        "transformers, eager": peer_step(config, "eager", batch),
        "transformers, default": peer_step(config, "sdpa", batch),
    }
    seconds = take_turns(steps, rounds, options.device, warmup=2)
    ratios = [
        Ratio(
            f"speed of omnivl / of transformers with {attention} attention",
            over(seconds[f"transformers, {attention}"], seconds["omnivl"]),
            at_least=AT_LEAST.get((options.device.type, attention)),
        )
        for attention in ("default", "eager")
    ]
    rows = [[name, str(rates(pairs, taken))] for name, taken in seconds.items()]
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    settings = {"preset": "small", "pairs": pairs, "text_length": TEXT_LENGTH, "rounds": rounds}
    return Report("towers", what, ratios, [Table("Pairs per second", ("towers", "median (range)"), rows)], settings)


if __name__ == "__main__":
    main_of("towers", __doc__, run)
