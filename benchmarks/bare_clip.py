"""A plain two-tower CLIP in bare PyTorch on the embedded drawings: the peer of the benchmarks of learning.

It has what a script without an engine would have: two pre-norm transformers, explicit attention products in bf16 where
the machine is faster with it (twice as fast as ``scaled_dot_product_attention`` on a CPU at these lengths), contrast
within the batch, AdamW with a cosine schedule. Pictures and texts come from the engine's loader, so that it sees the
same drawings in the same views, at the same cost, as the plan whose data it is given.

python -m benchmarks.bare_clip 180 0 --cpu        # trains for so long, prints recalls, pairs and cost as a line of JSON
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import ROOT
from engine.plan.parse import load_plan
from engine.plan.precision import dtype_of, faster_precision
from omnivl.chain.backward import FORWARD_AND_BACKWARD
from omnivl.data.batch import Batch
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.decode import evaluation_frames
from omnivl.data.loader import Loader
from omnivl.data.sizes import InputSizes
from omnivl.data.sources import open_source
from omnivl.data.tokenizer import load_tokenizer
from omnivl.tasks.scorers.recall import best_ranks, recalls

SIZE, WIDTH, HEADS, TEXT_LENGTH, EMBEDDING = 64, 192, 3, 16, 128
PLAN = ROOT / "configs" / "plans" / "records.yaml"


@dataclass(frozen=True)
class Settings:
    """What may be chosen of the peer.

    Attributes:
        patch_size: Side of a patch in pixels.
        pooling: Whether a tower's output is its first position or the mean of all positions.
        vision_layers: Blocks of the vision tower.
        text_layers: Blocks of the text tower; none makes it a bag of words.
        learning_rate: Peak.
        batch_size: Pairs of a step.
    """

    patch_size: int = 16
    pooling: Literal["first", "mean"] = "mean"
    vision_layers: int = 6
    text_layers: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 256

    def arguments(self) -> list[str]:
        """The settings as options of the command line."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(self).items()]

    def __str__(self) -> str:
        return (
            f"patches of {self.patch_size}, pooling {self.pooling}, {self.vision_layers} visual and "
            f"{self.text_layers} text blocks, rate {self.learning_rate:g}, {self.batch_size} pairs"
        )


@dataclass(frozen=True)
class Training:
    """What a training has taken.

    Attributes:
        pairs: Pairs seen.
        seconds: By the clock that bounds it, without the start.
        flops: Operations of the towers' matrix products, forward and backward, as ``omnivl.chain.flops`` counts them.
    """

    pairs: int
    seconds: float
    flops: float


class Block(nn.Module):
    """A pre-norm transformer block with explicit attention products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Advances ``x [B, S, D]``; ``bias [B, 1, 1, S]`` is added to the scores."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-1, -2)
        attended = (scores if bias is None else scores + bias).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class BareCLIP(nn.Module):
    """Two towers and a temperature. Parameters fp32, towers run under copies that ``torch.autocast`` makes."""

    def __init__(self, vocab_size: int, settings: Settings, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch, self.pooling, self.dtype = settings.patch_size, settings.pooling, dtype
        self.patches = nn.Linear(3 * self.patch**2, WIDTH)
        self.words = nn.Embedding(vocab_size, WIDTH)
        first = settings.pooling == "first"
        self.class_token = nn.Parameter(torch.randn(WIDTH) * 0.02) if first else None
        self.visual_positions = nn.Parameter(torch.randn((SIZE // self.patch) ** 2 + first, WIDTH) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(TEXT_LENGTH, WIDTH) * 0.02)
        self.visual = nn.ModuleList(Block() for _ in range(settings.vision_layers))
        self.text = nn.ModuleList(Block() for _ in range(settings.text_layers))
        self.visual_norm, self.text_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual_projection, self.text_projection = nn.Linear(WIDTH, EMBEDDING), nn.Linear(WIDTH, EMBEDDING)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.words.weight, std=0.02)

    def encode_visual(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, 3, 64, 64]`` to ``[B, 128]``, L2-normalised."""
        side, patch = SIZE // self.patch, self.patch
        scaled = pixels.float() / 127.5 - 1
        cut = scaled.view(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), side**2, -1)
        x = self.patches(cut)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(pixels), 1, -1), x], dim=1)
        x = self._tower(x + self.visual_positions, self.visual, None)
        pooled = x.mean(1) if self.pooling == "mean" else x[:, 0]
        return F.normalize(self.visual_projection(self.visual_norm(pooled)), dim=-1)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """``[B, L]`` to ``[B, 128]``, L2-normalised; padding (id 0) is not attended to."""
        token_ids = token_ids[:, : int((token_ids != 0).sum(1).max())]
        there = token_ids != 0
        bias = torch.zeros(there.shape, device=token_ids.device).masked_fill(~there, -1e4)[:, None, None]
        x = self.words(token_ids) + self.text_positions[: token_ids.shape[1]]
        x = self._tower(x, self.text, bias.to(self.dtype))
        mean = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        pooled = mean if self.pooling == "mean" else x[:, 0]
        return F.normalize(self.text_projection(self.text_norm(pooled)), dim=-1)

    def flops(self, token_ids: Tensor) -> float:
        """Operations of the towers' products for a batch's pictures and texts, padding left out, both ways."""
        rows, positions = len(token_ids), len(self.visual_positions)
        words, length = int((token_ids != 0).sum()), int((token_ids != 0).sum(1).max())
        products = rows * positions * len(self.visual) * _block_products(positions)
        products += words * len(self.text) * _block_products(length)
        products += rows * (SIZE**2 * 3 * WIDTH + 2 * WIDTH * EMBEDDING)
        return 2.0 * FORWARD_AND_BACKWARD * products

    def _tower(self, x: Tensor, blocks: nn.ModuleList, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = x.to(self.dtype)
            for block in blocks:
                x = block(x, bias)
        return x.float()


def _block_products(length: int) -> int:
    """Multiplications of one position of a block: attention's and the perceptron's maps, scores and their use."""
    return 12 * WIDTH**2 + 2 * length * WIDTH


def image_texts(plan: Path) -> tuple[DataEntryConfig, ...]:
    """The pictures with texts that the first stage of a plan trains on."""
    found = [entry for entry in load_plan(plan).stages[0].data if entry.kind == "image_text"]
    return tuple(dataclasses.replace(entry, fields=()) for entry in found)


def train_bare_clip(
    entries: tuple[DataEntryConfig, ...], seconds: float, seed: int, settings: Settings, *, cpu: bool = False
) -> tuple[BareCLIP, Training]:
    """Trains for a given time, which begins when model and data stand ready.

    Args:
        entries: Pictures with texts.
        seconds: How long.
        seed: Of weights and of the order of samples.
        settings: What may be chosen.
        cpu: Whether to count CPU time of this process instead of time by the clock.
    """
    torch.manual_seed(seed)
    tokenizer, clock = load_tokenizer("emoji"), time.process_time if cpu else time.monotonic
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    dtype = dtype_of(faster_precision(device))
    model = BareCLIP(tokenizer.special.vocab_size, settings, dtype).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    loader = Loader(
        entries,
        loader_config=LoaderConfig(),
        sizes=InputSizes(SIZE, SIZE, 1, settings.patch_size, 1, TEXT_LENGTH),
        tokenizer=tokenizer,
        micro_batch_size=settings.batch_size,
        seed=seed,
    )
    pairs, flops, start = 0, 0.0, clock()
    with loader:
        batches = iter(loader)
        while (done := (clock() - start) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, done / 0.05) * 0.5 * (1 + math.cos(math.pi * done))
            batch = next(batches)[0]
            loss = contrast(model, batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([loss])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert batch.token_ids is not None
            pairs, flops = pairs + batch.size, flops + model.flops(batch.token_ids)
        taken = clock() - start
    return model, Training(pairs, taken, flops)


def contrast(model: BareCLIP, batch: Batch) -> Tensor:
    """CLIP's loss within a batch. Two drawings of one concept are no negatives of each other."""
    assert batch.frames is not None and batch.token_ids is not None, "a batch of pictures with texts"
    device = model.logit_scale.device
    visual = model.encode_visual(batch.frames[:, 0].to(device))
    text = model.encode_text(batch.token_ids.to(device))
    logits = model.logit_scale.exp().clamp(max=100) * visual @ text.T
    same = (batch.identity[:, None] == batch.identity).float().to(device)
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def unseen_style_recalls(model: BareCLIP) -> dict[int, float]:
    """R@1, R@5 and R@10 of the Twemoji drawings against all names."""
    source = open_source(DataEntryConfig(source="emoji", kind="image_text", where={"style": ("twemoji",)}), seed=0)
    samples = [source.read(i) for i in range(len(source))]
    pixels = torch.stack([evaluation_frames(sample, SIZE, 1, LoaderConfig())[0] for sample in samples])
    device = model.logit_scale.device
    ids = torch.from_numpy(load_tokenizer("emoji").encode([sample.captions[0] for sample in samples], TEXT_LENGTH))
    visual = torch.cat([model.encode_visual(part.to(device)) for part in torch.split(pixels, 256)])
    text = torch.cat([model.encode_text(part.to(device)) for part in torch.split(ids, 256)])
    return recalls(best_ranks((visual @ text.T).cpu().numpy(), torch.eye(len(ids), dtype=torch.bool).numpy()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_clip", description=__doc__)
    parser.add_argument("seconds", type=float, help="how long to train")
    parser.add_argument("seed", type=int)
    parser.add_argument("--cpu", action="store_true", help="count seconds of the CPU, and compute on it")
    parser.add_argument("--plan", type=Path, default=PLAN, help="whose first stage's pictures with texts it sees")
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default %(default)s")
    given = parser.parse_args()
    settings = Settings(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Settings)})
    model, training = train_bare_clip(image_texts(given.plan), given.seconds, given.seed, settings, cpu=given.cpu)
    found = {"recalls": unseen_style_recalls(model), **dataclasses.asdict(training)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
