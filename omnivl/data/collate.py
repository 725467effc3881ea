"""Examples to a batch, with everything that the objectives draw in advance.

Shapes: B samples, T frames, S side of the picture, L text positions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from omnivl.chain.objective import Objective, PrepareContext
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.example import Example
from omnivl.data.tokenizer import Tokenizer
from omnivl.parts.config import ModelConfig


class Collator:
    """Makes batches for one model and one set of objectives."""

    def __init__(self, model: ModelConfig, objectives: Sequence[Objective], tokenizer: Tokenizer, seed: int) -> None:
        """Describes a collator.

        Args:
            model: Sizes of pictures, patches and texts.
            objectives: The stage's objectives.
            tokenizer: Texts to ids.
            seed: The stage's seed.
        """
        self._model, self._objectives, self._tokenizer, self._seed = model, tuple(objectives), tokenizer, seed

    def collate(self, examples: Sequence[Example], kind: DataKind, source: str, step: int) -> Batch:
        """A batch with ``prepared`` filled in.

        Args:
            examples: B examples of one kind.
            kind: Their kind.
            source: Name of the entry, part of the random keys.
            step: Optimizer step, for weight schedules.
        """
        batch = self.plain(examples, kind)
        side = (self._model.video_size if is_video(kind) else self._model.image_size) // self._model.patch_size
        context = PrepareContext(
            seed=self._seed,
            source=source,
            tokens=self._tokenizer.special,
            grid=(side, side),
            step=step,
            tubelet_size=self._model.tubelet_size if is_video(kind) else 1,
        )
        prepared: dict[str, Tensor] = {}
        for objective in self._objectives:
            if objective.demands(kind, batch.size) is not None:
                prepared.update(objective.prepare(batch, context))
                prepared[f"weight/{objective.key}"] = torch.tensor(_weight(objective, step), dtype=torch.float32)
        return replace(batch, prepared=prepared)

    def plain(self, examples: Sequence[Example], kind: DataKind) -> Batch:
        """A batch without ``prepared``, e.g. for evaluation."""
        first = examples[0].frames
        frames = _empty_frames((len(examples), len(first), 3, *first.shape[1:3]))
        for row, example in zip(frames.numpy(), examples, strict=True):
            for picture, planes in zip(example.frames, row, strict=True):
                cv2.split(picture, list(planes))  # writes the planes in place, twice as fast as a transposed copy
        texts = tuple(example.text for example in examples)
        batch = Batch(
            kind=kind,
            frames=frames,
            token_ids=torch.from_numpy(self._tokenizer.encode(texts, self._model.text_length)),
            identity=torch.tensor([example.identity for example in examples], dtype=torch.int64),
            label=torch.tensor([example.label for example in examples], dtype=torch.int64),
            position=torch.tensor([example.position for example in examples], dtype=torch.int64),
            captions=texts,
        )
        batch.check()
        return batch


def _empty_frames(shape: tuple[int, ...]) -> Tensor:
    """Memory for a batch's frames, uint8; in a data worker the shared memory in which they travel.

    torch's own ``default_collate`` gets its memory in the same way.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _weight(objective: Objective, step: int) -> float:
    """The weight of an objective's loss at a step: its schedule if it has one, else its constant, else 1."""
    schedule = getattr(objective, "weight_at", None)
    return float(schedule(step)) if schedule is not None else float(getattr(objective, "weight", 1.0))
