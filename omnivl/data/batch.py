"""The input of the chain: a batch of samples of one kind.

Shapes: B samples, T frames (1 for images), P pictures of a set, H x W pixels, N patches of a frame, L text positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

DataKind = Literal["image_text", "video_text", "image_label", "video_label", "text", "image", "video", "images_text"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
"""The order is part of checkpoints: UniVLC's queue stores a kind's index. New kinds are appended."""

Visual = Literal["none", "image", "clip", "set"]
VISUALS: tuple[Visual, ...] = get_args(Visual)

_VISUALS: Mapping[DataKind, Visual] = {
    "image_text": "image",
    "video_text": "clip",
    "image_label": "image",
    "video_label": "clip",
    "text": "none",
    "image": "image",
    "video": "clip",
    "images_text": "set",
}


def visual_of(kind: DataKind) -> Visual:
    """The visual part of a sample of this kind: nothing, a picture, a clip, or a set of pictures."""
    return _VISUALS[kind]


def has_visual(kind: DataKind) -> bool:
    """Whether samples of this kind show anything."""
    return visual_of(kind) != "none"


def has_text(kind: DataKind) -> bool:
    """Whether samples of this kind have a text."""
    return kind not in ("image", "video")


def is_pair(kind: DataKind) -> bool:
    """Whether samples of this kind are one picture or clip with a text."""
    return has_text(kind) and visual_of(kind) in ("image", "clip")


def is_video(kind: DataKind) -> bool:
    """Whether samples of this kind are clips."""
    return visual_of(kind) == "clip"


def is_label(kind: DataKind) -> bool:
    """Whether the text of such a sample is a class name put into a prompt rather than a caption."""
    return kind.endswith("label")


def num_places(frames: Tensor) -> int:
    """N, of frames whose patches stand side by side."""
    return frames.shape[-1] // frames.shape[-2]


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch. All samples have the same kind and number of frames or pictures.

    Where pictures keep their sizes, the patches of each stand side by side in its own order, row by row, so that a
    frame is one patch high and N patches wide, as many as the largest one has; others end in black patches.

    Attributes:
        kind: One of the data kinds.
        frames: uint8 ``[B, T, 3, H, W]``, of a set ``[B, P, 3, H, W]``; RGB, not normalised: the chain normalises on
            its device. None where the kind shows nothing.
        token_ids: int64 ``[B, L]``: ``[CLS] words [SEP]``, padded with the tokenizer's padding id. None where the kind
            has no text.
        identity: int64 ``[B]``: UniVLC's y. Samples with equal identity are positives of each other.
        label: int64 ``[B]``: class index within the source, or -1.
        position: int64 ``[B]``: the sample's index in the endless order of its data entry. All random keys contain it.
        prepared: The objectives' draws for the batch (masked tokens, patch masks ...), by ``objective/name``.
        captions: The text behind ``token_ids``, for logs and galleries.
        entry: Key of the data entry that the samples come from.
        fields: The samples' fields by name (see ``omnivl.data.fields``): tensors whose first dimension is B, which go
            on to the chain, and tuples of B Python values, which only ``prepare`` sees.
        grids: int64 ``[B, 2]``, rows and columns of the patches of each sample's frames where pictures keep their
            sizes; else None.
        second_view: Another random view of what ``frames`` show, of their shape, which momentum twins see; None where
            an entry has one view.
    """

    kind: DataKind
    frames: Tensor | None
    token_ids: Tensor | None
    identity: Tensor
    label: Tensor
    position: Tensor
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    entry: str = ""
    fields: Mapping[str, Tensor | tuple[object, ...]] = field(default_factory=dict)
    grids: Tensor | None = None
    second_view: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return self.position.shape[0]

    @property
    def visual(self) -> Visual:
        """The visual part of the samples."""
        return visual_of(self.kind)

    @property
    def num_frames(self) -> int:
        """Number of frames, T; 1 for images, P for sets, 0 where nothing is shown."""
        return 0 if self.frames is None else self.frames.shape[1]

    @property
    def places(self) -> int:
        """N, the patches of the largest frame where pictures keep their sizes."""
        assert self.frames is not None and self.grids is not None
        return num_places(self.frames)

    def check(self) -> None:
        """Asserts the invariants that the chain relies on."""
        assert (self.frames is not None) == has_visual(self.kind), f"frames of a batch of {self.kind}"
        assert (self.token_ids is not None) == has_text(self.kind), f"texts of a batch of {self.kind}"
        if self.frames is not None:
            assert self.frames.dtype == torch.uint8 and self.frames.dim() == 5 and self.frames.shape[2] == 3
            assert self.frames.shape[0] == self.size
            assert self.visual != "image" or self.num_frames == 1, "an image is a clip of one frame"
        if self.second_view is not None:
            assert self.frames is not None and self.grids is None, "pictures of one size"
            assert self.second_view.dtype == torch.uint8 and self.second_view.shape == self.frames.shape
        if self.token_ids is not None:
            assert self.token_ids.dtype == torch.int64 and self.token_ids.shape[0] == self.size
        if self.grids is not None:
            assert self.frames is not None and self.grids.shape == (self.size, 2)
        for tensor in (self.identity, self.label, self.position):
            assert tensor.dtype == torch.int64 and tensor.shape == (self.size,)
        for name, values in self.fields.items():
            assert len(values) == self.size, f"field {name}"
