"""CLIPs of open_clip on LAION-400M, A100 of 40 GB in nodes of four: mixed precision, DDP, losses over own rows.

Their attention is that of ``nn.MultiheadAttention`` before torch had fused kernels; norms and softmax are in fp32.

Source: github.com/mlfoundations/open_clip, docs/PRETRAINED.md (GPUs, hours, batches, recomputation of L/14): 12.8
    billion images over GPU-hours. Automatic mixed precision, 12 cores a GPU and local losses for all are recalled.

Shapes: B samples of a GPU, L positions, D width, H heads, E width of an embedding, R GPUs.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.published.counted import counted, machine, on_meta, optimizer_kernels, seconds, started
from benchmarks.published.table import Row
from engine.estimate.loading import loading_seconds
from engine.estimate.traffic import Cluster

_HALF = torch.bfloat16  # stands for fp16, which moves as many bytes
_SAMPLES = 12.8e9


class Linear(nn.Linear):
    """Whose weights every step casts."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D']``."""
        bias = None if self.bias is None else self.bias.to(_HALF)
        return F.linear(x, self.weight.to(_HALF), bias)


class Norm(nn.LayerNorm):
    """In fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to the same."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(_HALF)


class Block(nn.Module):
    """A block of ``ResidualAttentionBlock``'s operations."""

    def __init__(self, width: int, heads: int, *, quick: bool) -> None:
        """Has weights.

        Args:
            width: D.
            heads: H.
            quick: Whether the activation is ``x * sigmoid(1.702 * x)``.
        """
        super().__init__()
        self.heads, self.quick = heads, quick
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.packed, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``[L, B, D]`` to the same."""
        length, batch, width = x.shape
        parts = self.packed(self.norms[0](x)).chunk(3, -1)
        q, k, v = (one.contiguous().view(length, batch * self.heads, -1).transpose(0, 1) for one in parts)
        scores = torch.bmm(q / (width // self.heads) ** 0.5, k.transpose(1, 2))
        weights = (scores if mask is None else scores + mask).float().softmax(-1).to(_HALF)
        seen = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, width)
        x = x + self.out(seen)
        inner = self.up(self.norms[1](x))
        inner = inner * torch.sigmoid(1.702 * inner) if self.quick else F.gelu(inner)
        out: Tensor = x + self.down(inner)
        return out


class Tower(nn.Module):
    """Blocks, and the projection of one position."""

    def __init__(self, width: int, depth: int, heads: int, embedding: int, *, quick: bool, recomputed: bool) -> None:
        """Has weights.

        Args:
            width: D.
            depth: Blocks.
            heads: H.
            embedding: E.
            quick: See ``Block``.
            recomputed: Whether the backward pass computes blocks again.
        """
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, quick=quick) for _ in range(depth))
        self.norm, self.projection, self.recomputed = Norm(width), Linear(width, embedding, bias=False), recomputed

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``[L, B, D]`` to ``[B, E]``."""
        for block in self.blocks:
            if self.recomputed:
                x = checkpoint(block, x, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, mask)
        return F.normalize(self.projection(self.norm(x[0])), dim=-1)


class Clip(nn.Module):
    """Both towers, with the similarities of own rows to those of all GPUs."""

    def __init__(self, size: str, patch: int, *, recomputed: bool) -> None:
        """Has weights."""
        super().__init__()
        wide, quick = size == "L", patch == 32
        vision, text, embedding = (1024, 24, 16), (768 if wide else 512, 12, 12 if wide else 8), 768 if wide else 512
        vision = vision if wide else (768, 12, 12)
        self.patches = nn.Conv2d(3, vision[0], patch, patch, bias=False)
        self.places = nn.Parameter(torch.empty((224 // patch) ** 2 + 1, 1, vision[0]))
        self.words, self.orders = nn.Embedding(49408, text[0]), nn.Parameter(torch.empty(77, 1, text[0]))
        self.first = Norm(vision[0])
        self.vision = Tower(*vision, embedding, quick=quick, recomputed=recomputed)
        self.text = Tower(*text, embedding, quick=quick, recomputed=recomputed)

    def forward(self, pixels: Tensor, ids: Tensor, gpus: int) -> Tensor:
        """``[B, 3, 224, 224]`` and int64 ``[B, 77]`` to the loss of B rows and columns of R * B."""
        seen = F.conv2d(pixels, self.patches.weight.to(_HALF), stride=self.patches.stride).flatten(2).permute(2, 0, 1)
        seen = torch.cat([seen[:1], seen]) + self.places.to(_HALF)
        image = self.vision(self.first(seen.contiguous()), None)
        read = self.words(ids).transpose(0, 1).to(_HALF) + self.orders.to(_HALF)
        text = self.text(read.contiguous(), torch.zeros(77, 77, dtype=_HALF, device=ids.device))
        labels = torch.zeros(len(image), dtype=torch.int64, device=ids.device)
        pairs = (image, text.repeat(gpus, 1)), (text, image.repeat(gpus, 1))  # the second stands for what is gathered
        losses = [F.cross_entropy((100.0 * own @ others.t()).float(), labels) for own, others in pairs]
        return (losses[0] + losses[1]) / 2


def rows() -> list[Row]:
    """B/32, B/16 and L/14."""
    return [
        _row("B/32", "B", 32, 256, 128, 4600),
        _row("B/16", "B", 16, 192, 176, 10700),
        _row("L/14", "L", 14, 96, 400, 50800),
    ]


def _row(name: str, size: str, patch: int, batch: int, gpus: int, hours: float) -> Row:
    recomputed = size == "L"
    with on_meta():
        model = Clip(size, patch, recomputed=recomputed)
        pixels = torch.zeros(batch, 3, 224, 224, dtype=_HALF)
        ids = torch.zeros(batch, 77, dtype=torch.int64)
    made = counted("clip", model, lambda: model(pixels, ids, gpus))
    embeddings = 2.0 * 2 * batch * model.vision.projection.out_features
    size_of = replace(made.size, cast=0)  # nothing is sharded
    layer = replace(made, size=size_of, done=replace(made.done, joined=embeddings, joins=2.0))
    layers = [layer, started("optimizer", optimizer_kernels(model))]
    hardware = machine("a100-40gb")
    cluster = Cluster(hardware, gpus // 4, 4)
    step = seconds(layers, cluster, batch, "plain", 0)
    loading = loading_seconds(hardware, node_bytes=4 * batch * 50e3, node_images=4.0 * batch)
    slowest = max(step, *loading.values())
    note = "eager, attention without fused kernels; " + ("blocks recomputed; " if recomputed else "")
    note += f"{'loader' if slowest > step else 'devices'} slowest"
    published = _SAMPLES / (3600 * hours)
    what = f"open_clip {name}, {gpus} A100 40 GB, {batch} a GPU"
    return Row(what, "images/s a GPU", published, batch / slowest, note)
