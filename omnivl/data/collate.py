"""Examples to a batch, with everything that the objectives draw in advance.

Shapes: B samples, T frames, S side of the picture, L text positions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import cv2
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from omnivl.data.batch import Batch, DataKind
from omnivl.data.example import Example
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import Tokenizer


class Prepare(Protocol):
    """What draws further tensors from a batch before it goes to training. Picklable; of objectives in training."""

    def __call__(self, batch: Batch, entry: str, step: int) -> dict[str, Tensor]:
        """The tensors for ``Batch.prepared``.

        Args:
            batch: A batch without ``prepared``.
            entry: Key of its data entry, part of the random keys.
            step: Optimizer step, for schedules.
        """


class Collator:
    """Makes batches of one text length."""

    def __init__(self, sizes: InputSizes, tokenizer: Tokenizer, prepare: Prepare | None = None) -> None:
        """Describes a collator.

        Args:
            sizes: Of which the length of texts is used.
            tokenizer: Texts to ids.
            prepare: Draws ``Batch.prepared``; None for nothing.
        """
        self._sizes, self._tokenizer, self._prepare = sizes, tokenizer, prepare

    def collate(self, examples: Sequence[Example], kind: DataKind, entry: str, step: int) -> Batch:
        """A batch with ``prepared`` filled in.

        Args:
            examples: B examples of one kind.
            kind: Their kind.
            entry: Key of the data entry, part of the random keys.
            step: Optimizer step, for weight schedules.
        """
        batch = self.plain(examples, kind)
        return batch if self._prepare is None else replace(batch, prepared=self._prepare(batch, entry, step))

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
            token_ids=torch.from_numpy(self._tokenizer.encode(texts, self._sizes.text_length)),
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
