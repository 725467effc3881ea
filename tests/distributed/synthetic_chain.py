"""A small chain with every property that a host has to support, and batches for it.

It has an EMA twin and a part that only clips use (``visual_*``), layers that labels leave out (``generation_*``),
a join over replicas and a queue in its middle (``contrast``), and an odd number of elements in most parameters.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch, DataKind, is_label, is_video

WIDTH, WORDS, LENGTH, SIDE, QUEUE = 10, 37, 5, 4, 21
KINDS: tuple[DataKind, ...] = ("image_text", "video_text", "image_label")


def plan_layout(kind: DataKind, batch_size: int, num_frames: int, entry: str = "") -> StepLayout:
    rows = {"clean": slice(0, batch_size)}
    return StepLayout(
        kind,
        batch_size,
        num_frames,
        visual=rows,
        text=rows,
        generation={} if is_label(kind) else rows,
        twins=frozenset({"visual"}),
    )


class Embed(ChainLayer):
    stack, level = "embed", -1

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * SIDE * SIDE, WIDTH)
        self.word_embedding = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)

    def undecayed(self) -> Iterator[nn.Parameter]:
        yield from (self.word_embedding.weight, self.position)

    def forward(self, state: State) -> State:
        visual = self.patch(state["frames"].float().flatten(2) / 255 - 0.5)
        text = self.word_embedding(state["token_ids"]) + self.position
        return state.updated(visual=visual, text=text, momentum_visual=visual.detach(), drop=("frames",))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 13), nn.Linear(13, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class VisualLayer(ChainLayer):
    """A block with a temporal part that images leave out, and a twin."""

    stack = "visual"

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        self.block, self.momentum_block = Mlp(), Mlp()
        frozen_twin(self.momentum_block, self.block)
        self.temporal = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: State) -> State:
        visual = state["visual"]
        if state.layout.is_video:
            visual = visual + self.temporal(visual.mean(1, keepdim=True))
        with torch.no_grad():
            momentum = self.momentum_block(state["momentum_visual"])
        return state.updated(visual=self.block(visual), momentum_visual=momentum)

    def after_step(self) -> None:
        ema_update_(self.momentum_block, self.block, 0.9, self.local_storage)


class TextLayer(ChainLayer):
    stack, level = "text", 0

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()

    def forward(self, state: State) -> State:
        return state.updated(text=self.block(state["text"]))


class Contrast(ChainLayer):
    """Contrastive loss over the joined batch and a queue of momentum keys."""

    stack = "contrast"

    def __init__(self, gather: Gather) -> None:
        super().__init__()
        self.gather = gather
        self.temperature = nn.Parameter(torch.tensor([0.5]))
        self.projection = nn.Linear(WIDTH, 7, bias=False)
        self.register_buffer("queue", torch.zeros(QUEUE, 7))
        self.register_buffer("filled", torch.zeros(QUEUE, dtype=torch.bool))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self._outbox: list[Tensor] = []

    def forward(self, state: State) -> State:
        visual = F.normalize(self.projection(state["visual"].mean(1)), dim=-1)
        text = F.normalize(self.projection(state["text"].mean(1)), dim=-1)
        keys = F.normalize(self.projection(state["momentum_visual"].mean(1)), dim=-1).detach()
        self._outbox.append(self.gather.join(keys))
        own = torch.arange(len(text)) + self.gather.replica * len(text)
        known = torch.cat([self.gather.join(visual), self.queue]) @ text.T / self.temperature
        known[-QUEUE:].masked_fill_(~self.filled[:, None], -1e4)
        backward = visual @ self.gather.join(text).T / self.temperature
        loss = F.cross_entropy(known.T, own) + F.cross_entropy(backward, own)
        accuracy = (backward.argmax(1) == own).float().mean()
        return state.merged({"loss/univlc": loss, "metric/univlc/accuracy": accuracy})

    def after_step(self) -> None:
        keys = torch.cat(self._outbox)[-QUEUE:]
        places = (self.cursor + torch.arange(len(keys))) % QUEUE
        self.queue[places], self.filled[places] = keys, True
        self.cursor.copy_((self.cursor + len(keys)) % QUEUE)
        self._outbox.clear()

    def discard_step(self) -> None:
        self._outbox.clear()


class GenerationLayer(ChainLayer):
    stack = "generation"

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level
        self.block, self.cross = Mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, state: State) -> State:
        if not state.layout.generation:
            return state
        stream = state.get("generation", state["text"])
        return state.updated(generation=self.block(stream) + self.cross(state["visual"].mean(1, keepdim=True)))


class Losses(ChainLayer):
    stack = "losses"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WORDS)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.head.parameters()

    def forward(self, state: State) -> State:
        loss = state["loss/univlc"]
        if not state.layout.generation:
            return state.merged({"loss": loss})
        logits = self.head(state["generation"][:, :-1]).flatten(0, 1)
        words = F.cross_entropy(logits, state["token_ids"][:, 1:].flatten())
        return state.merged({"loss": loss + words, "loss/lm": words})


def build_synthetic_chain(gather: Gather | None = None, seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain(
        {
            "embed": Embed(),
            "visual_00": VisualLayer(0),
            "visual_01": VisualLayer(1),
            "text_00": TextLayer(),
            "contrast": Contrast(gather or LocalGather()),
            "generation_00": GenerationLayer(0),
            "generation_01": GenerationLayer(1),
            "losses": Losses(),
        }
    )


def joined_batch(index: int, size: int, kind: DataKind) -> Batch:
    """Micro-batch ``index`` of the whole run: what all replicas hold together."""
    draw = torch.Generator().manual_seed(1000 + index)
    frames = 3 if is_video(kind) else 1
    return Batch(
        kind=kind,
        frames=torch.randint(0, 256, (size, frames, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8),
        token_ids=torch.randint(0, WORDS, (size, LENGTH), generator=draw),
        identity=torch.arange(size),
        label=torch.full((size,), -1),
        position=torch.arange(size) + index * size,
    )


def share(batch: Batch, replica: int, replicas: int) -> Batch:
    """A replica's rows of a joined batch."""
    size = batch.size // replicas
    rows = slice(replica * size, (replica + 1) * size)
    fields = ("frames", "token_ids", "identity", "label", "position")
    return Batch(batch.kind, *(getattr(batch, name)[rows] for name in fields))


def step_batches(step: int, accumulation: int, size: int, gather: Gather) -> list[Batch]:
    """The replica's micro-batches of one step. Kinds change between and within steps."""
    indices = range(step * accumulation, (step + 1) * accumulation)
    # Pairs of equal kinds first, so that whole steps leave layers out; then mixed ones.
    kinds = [KINDS[index // 2 % 3] if index < 6 else KINDS[index % 3] for index in indices]
    joined = [joined_batch(index, size, kind) for index, kind in zip(indices, kinds, strict=True)]
    return [share(batch, gather.replica, gather.replicas) for batch in joined]
