"""Makes a batch of examples, with everything that the objectives draw in advance.

Shapes: B samples, T frames, h x w pixels, N patches of a frame, L text positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from omnivl.data.augment import Pixels
from omnivl.data.batch import Batch, DataKind, has_text, has_visual, is_video
from omnivl.data.example import Example
from omnivl.data.field_tensors import collate_fields
from omnivl.data.fields import Field
from omnivl.data.ring import new_shared
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import Tokenizer

STRIDE = 16
"""Texts of a batch that are trimmed have a multiple of so many positions, so that there are few shapes."""

PATCH_STRIDE = 8
"""As ``STRIDE``, for patches of a frame."""

EmptyFrames = Callable[[tuple[int, ...]], Tensor]
"""Gives memory for the frames of a batch of some shape, uint8."""


class Prepare(Protocol):
    """Interface of a callable that makes further tensors from a batch, in training the objectives' draws. Picklable."""

    def __call__(self, batch: Batch, entry: str, step: int) -> dict[str, Tensor]:
        """The tensors for ``Batch.prepared``.

        Args:
            batch: A batch without ``prepared``.
            entry: Key of its data entry, part of the random keys.
            step: Optimizer step, for schedules.
        """


class Collator:
    """Makes batches whose texts have one length, and whose frames have one size or one number of patches."""

    def __init__(
        self, sizes: InputSizes, tokenizer: Tokenizer, prepare: Prepare | None = None, *, trims: bool = False
    ) -> None:
        """Describes a collator.

        Args:
            sizes: The length of texts, and whether pictures keep their sizes.
            tokenizer: Texts to ids.
            prepare: Draws ``Batch.prepared``; None for nothing.
            trims: Whether texts end where the longest of a batch does, rounded up to ``STRIDE`` positions, and frames
                of their own size where the largest does.
        """
        self._sizes, self._tokenizer, self._prepare, self._trims = sizes, tokenizer, prepare, trims

    def collate(
        self,
        examples: Sequence[Example],
        kind: DataKind,
        entry: str,
        step: int,
        fields: Mapping[str, Field] | None = None,
        empty: EmptyFrames | None = None,
    ) -> Batch:
        """A batch with ``prepared`` filled in.

        Args:
            examples: B examples of one kind.
            kind: Their kind.
            entry: Key of the data entry, part of the random keys.
            step: Optimizer step, for weight schedules.
            fields: Types of the examples' fields.
            empty: Memory for the frames; None for new memory.
        """
        batch = self.plain(examples, kind, entry, fields, empty)
        return batch if self._prepare is None else replace(batch, prepared=self._prepare(batch, entry, step))

    def plain(
        self,
        examples: Sequence[Example],
        kind: DataKind,
        entry: str = "",
        fields: Mapping[str, Field] | None = None,
        empty: EmptyFrames | None = None,
    ) -> Batch:
        """A batch without ``prepared``, e.g. for evaluation; see ``collate``."""
        texts = tuple(example.text for example in examples if example.text is not None)
        token_ids = self._tokenizer.encode(texts, self._sizes.text_length) if has_text(kind) else None
        if self._trims and token_ids is not None:
            special = self._tokenizer.special
            longest = 1 + int((token_ids != special.pad).any(0).nonzero()[0].max(initial=0))
            longest += special.pad == special.sep  # the end of the longest text, where padding repeats it
            token_ids = token_ids[:, : STRIDE * math.ceil(longest / STRIDE)]
        kept = [example.fields for example in examples]
        pictures = [example.pictures for example in examples if example.pictures is not None]
        room = empty or new_frames
        frames, grids = self._frames(pictures, is_video(kind), room) if has_visual(kind) else (None, None)
        second = [example.second_view for example in examples if example.second_view is not None]
        batch = Batch(
            kind=kind,
            frames=frames,
            token_ids=None if token_ids is None else torch.from_numpy(token_ids),
            identity=torch.tensor([example.identity for example in examples], dtype=torch.int64),
            label=torch.tensor([example.label for example in examples], dtype=torch.int64),
            position=torch.tensor([example.position for example in examples], dtype=torch.int64),
            captions=texts,
            entry=entry,
            fields=collate_fields(fields or {}, kept, self._tokenizer, self._sizes.side(is_video(kind))),
            grids=grids,
            second_view=_frames(second, new_frames) if second else None,
        )
        batch.check()
        return batch

    def _frames(self, pictures: Sequence[Pixels], clips: bool, empty: EmptyFrames) -> tuple[Tensor, Tensor | None]:
        """The pixels of a batch, and the rows and columns of their patches where they keep their sizes."""
        if not self._sizes.native:
            return _frames(pictures, empty), None
        rows, columns = self._sizes.grid(clips)
        return in_strips(pictures, self._sizes.patch_size, None if self._trims else rows * columns, empty)


def most_frame_bytes(sizes: InputSizes, clips: bool, count: int) -> int:
    """The bytes of the pixels of ``count`` pictures, or frames of clips, at most."""
    rows, columns = sizes.grid(clips)
    patches = PATCH_STRIDE * math.ceil(rows * columns / PATCH_STRIDE)
    return 3 * count * max(sizes.side(clips) ** 2, patches * sizes.patch_size**2 if sizes.native else 0)


def _frames(pictures: Sequence[Pixels], empty: EmptyFrames) -> Tensor:
    """The pixels of pictures of one size, uint8 ``[B, T, 3, h, w]``."""
    first = pictures[0]
    frames = empty((len(pictures), len(first), 3, *first.shape[1:3]))
    for row, own in zip(frames.numpy(), pictures, strict=True):
        for picture, planes in zip(own, row, strict=True):
            cv2.split(picture, list(planes))  # writes the planes in place, twice as fast as a transposed copy
    return frames


def in_strips(
    pictures: Sequence[Pixels], patch: int, most: int | None = None, empty: EmptyFrames | None = None
) -> tuple[Tensor, Tensor]:
    """The patches of pictures of different sizes side by side, row by row.

    Args:
        pictures: ``[T, h, w, 3]`` each; h and w are multiples of ``patch``.
        patch: Side of a patch in pixels.
        most: N; None: those of the largest, rounded up to ``PATCH_STRIDE``.
        empty: Memory for the frames; None for new memory.

    Returns:
        uint8 ``[B, T, 3, patch, N * patch]``, and the rows and columns of each, int64 ``[B, 2]``.
    """
    grids = np.array([[one.shape[1] // patch, one.shape[2] // patch] for one in pictures], dtype=np.int64)
    if most is None:
        most = PATCH_STRIDE * math.ceil(int(grids.prod(axis=1).max()) / PATCH_STRIDE)
    frames = (empty or new_frames)((len(pictures), len(pictures[0]), 3, patch, most * patch))
    for row, own in zip(frames.numpy(), pictures, strict=True):
        down, across = own.shape[1] // patch, own.shape[2] // patch
        length = down * across * patch
        cut = own.reshape(len(own), down, patch, across, patch, 3).transpose(0, 5, 2, 1, 3, 4)
        row[..., :length] = cut.reshape(len(own), 3, patch, length)
        row[..., length:] = 0
    return frames, torch.from_numpy(grids)


def from_strip(frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """One sample's frames as pictures again, ``[T, 3, h, w]``, from ``[T, 3, patch, N * patch]``; see ``in_strips``."""
    (rows, columns), (times, _, patch, _) = grid, frames.shape
    strip = frames[..., : rows * columns * patch].reshape(times, 3, patch, rows, columns, patch)
    return strip.permute(0, 1, 3, 2, 4, 5).reshape(times, 3, rows * patch, columns * patch)


def new_frames(shape: tuple[int, ...]) -> Tensor:
    """Memory for a batch's frames, uint8; in a data worker shared memory, through which they are sent."""
    return torch.empty(shape, dtype=torch.uint8) if get_worker_info() is None else new_shared(shape)
