"""A plain two-tower CLIP in bare PyTorch on the embedded drawings: the peer of the learning benchmark.

It has what a script without an engine would have: two pre-norm transformers, explicit attention products in bf16 (twice
as fast as ``scaled_dot_product_attention`` on a CPU at these lengths), random affine and colour augmentation on
tensors, AdamW with a cosine schedule, all drawings decoded once into memory. About 5.3 M parameters at 64 px with
patches of 8.

python -m benchmarks.bare_clip SECONDS SEED        # trains for so long, prints recalls and pairs as one line of JSON
"""

import json
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.decode import evaluation_frames
from omnivl.data.sources import open_source
from omnivl.data.tokenizer import load_tokenizer
from omnivl.randomness import generator
from omnivl.tasks.ranking import recalls

SIZE, PATCH, WIDTH, HEADS, VISION_LAYERS, TEXT_LAYERS, TEXT_LENGTH, EMBEDDING = 64, 8, 192, 3, 6, 4, 16, 128


@dataclass(frozen=True)
class Drawings:
    """One style of all drawings, in memory.

    Attributes:
        pixels: uint8 ``[N, 3, 64, 64]``.
        names: The name of each.
        captions: Name-and-tag texts of each.
    """

    pixels: Tensor
    names: list[str]
    captions: list[tuple[str, ...]]


def load_drawings(*styles: str) -> Drawings:
    """Decodes the drawings of some styles."""
    source = open_source(DataEntryConfig(source="emoji", kind="image_text", where={"style": styles}), seed=0)
    samples = [source.read(i) for i in range(len(source))]
    pixels = torch.stack([evaluation_frames(sample, SIZE, 1, LoaderConfig())[0] for sample in samples])
    return Drawings(pixels, [sample.captions[0] for sample in samples], [sample.captions for sample in samples])


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
    """Two towers and a temperature. Parameters fp32, towers run under bf16 copies made by ``torch.autocast``."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH**2, WIDTH)
        self.words = nn.Embedding(vocab_size, WIDTH)
        self.class_token = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.visual_positions = nn.Parameter(torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(TEXT_LENGTH, WIDTH) * 0.02)
        self.visual = nn.ModuleList(Block() for _ in range(VISION_LAYERS))
        self.text = nn.ModuleList(Block() for _ in range(TEXT_LAYERS))
        self.visual_norm, self.text_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual_projection, self.text_projection = nn.Linear(WIDTH, EMBEDDING), nn.Linear(WIDTH, EMBEDDING)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.words.weight, std=0.02)

    def encode_visual(self, pixels: Tensor) -> Tensor:
        """``[B, 3, 64, 64]`` in [0, 1] to ``[B, 128]``, L2-normalised."""
        side = SIZE // PATCH
        cut = pixels.view(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), side**2, -1)
        x = torch.cat([self.class_token.expand(len(pixels), 1, -1), self.patches((cut - 0.5) / 0.5)], dim=1)
        return self._tower(x + self.visual_positions, self.visual, self.visual_norm, self.visual_projection, None)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """``[B, L]`` to ``[B, 128]``, L2-normalised; padding (id 0) is not attended to."""
        token_ids = token_ids[:, : int((token_ids != 0).sum(1).max())]
        padding = (token_ids == 0)[:, None, None]
        bias = torch.zeros(padding.shape, device=token_ids.device).masked_fill(padding, -1e4)
        x = self.words(token_ids) + self.text_positions[: token_ids.shape[1]]
        return self._tower(x, self.text, self.text_norm, self.text_projection, bias.bfloat16())

    def _tower(self, x: Tensor, blocks: nn.ModuleList, norm: nn.Module, out: nn.Module, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            x = x.bfloat16()
            for block in blocks:
                x = block(x, bias)
        return F.normalize(out(norm(x[:, 0].float())), dim=-1)


def augment(pixels: Tensor) -> Tensor:
    """Random affine map and colour change of uint8 ``[B, 3, H, W]``; returns floats in [0, 1]. White fills in."""
    count = len(pixels)
    x = pixels.float() / 255

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape, device=x.device).uniform_(low, high)

    angle, scale = draw(-0.35, 0.35), 1 / draw(0.7, 1.15)
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    maps = torch.stack(
        [
            torch.stack([angle.cos() * scale * flip, -angle.sin() * scale, draw(-0.15, 0.15)], dim=1),
            torch.stack([angle.sin() * scale * flip, angle.cos() * scale, draw(-0.15, 0.15)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)
    x = x * draw(0.7, 1.3, 1, 1, 1) + draw(-0.15, 0.15, 3, 1, 1)
    return x.clamp(0, 1)


def train_bare_clip(
    seconds: float, seed: int, batch_size: int = 256, learning_rate: float = 1e-3
) -> tuple[BareCLIP, int]:
    """Trains on the 3D and Noto drawings for a given time.

    Returns:
        The model, and the number of pairs that it saw.
    """
    torch.manual_seed(seed)
    random = generator(seed, "bare_clip")
    drawings, tokenizer = load_drawings("fluent", "noto"), load_tokenizer("emoji")
    concepts = {name: i for i, name in enumerate(sorted(set(drawings.names)))}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    identity = torch.tensor([concepts[name] for name in drawings.names], device=device)
    pixels = drawings.pixels.to(device)
    model = BareCLIP(tokenizer.special.vocab_size).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    order: list[int] = []
    seen, start = 0, time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, done / 0.05) * 0.5 * (1 + math.cos(math.pi * done))
        if len(order) < batch_size:
            order += torch.randperm(len(drawings.names)).tolist()
        rows, order = order[:batch_size], order[batch_size:]
        texts = [drawings.captions[i][int(random.integers(len(drawings.captions[i])))] for i in rows]
        visual = model.encode_visual(augment(pixels[rows]))
        text = model.encode_text(torch.from_numpy(tokenizer.encode(texts, TEXT_LENGTH)).to(device))
        logits = model.logit_scale.exp().clamp(max=100) * visual @ text.T
        same = (identity[rows][:, None] == identity[rows]).float()
        targets = same / same.sum(1, keepdim=True)  # two drawings of one concept are no negatives of each other
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += batch_size
    return model, seen


@torch.no_grad()
def unseen_style_recalls(model: BareCLIP) -> dict[int, float]:
    """R@1, R@5 and R@10 of the Twemoji drawings against all names."""
    drawings, tokenizer = load_drawings("twemoji"), load_tokenizer("emoji")
    device = model.logit_scale.device
    visual = torch.cat(
        [model.encode_visual(part.float() / 255) for part in torch.split(drawings.pixels.to(device), 256)]
    )
    names = torch.from_numpy(tokenizer.encode(drawings.names, TEXT_LENGTH)).to(device)
    text = torch.cat([model.encode_text(part) for part in torch.split(names, 256)])
    return recalls((visual @ text.T).cpu(), torch.eye(len(names), dtype=torch.bool))


if __name__ == "__main__":
    trained, pairs_seen = train_bare_clip(float(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(json.dumps({"recalls": unseen_style_recalls(trained), "pairs": pairs_seen}) + "\n")
