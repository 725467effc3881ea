"""What the data side hands to the chain: a batch of one kind of sample.

Shapes: B samples, T frames (1 for images), H x W pixels, L text positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

DataKind = Literal["image_text", "video_text", "image_label", "video_label"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)


def is_video(kind: DataKind) -> bool:
    """Whether samples of this kind are clips."""
    return kind.startswith("video")


def is_label(kind: DataKind) -> bool:
    """Whether the text of such a sample is a class name put into a prompt rather than a caption."""
    return kind.endswith("label")


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch. All samples have the same kind, size and number of frames.

    Attributes:
        kind: One of the four data kinds.
        frames: uint8 ``[B, T, 3, H, W]``, RGB, not normalised: the chain normalises on its device.
        token_ids: int64 ``[B, L]``: ``[CLS] words [SEP]``, padded with the tokenizer's padding id.
        identity: int64 ``[B]``: UniVLC's y. Samples with equal identity are positives of each other.
        label: int64 ``[B]``: class index within the source, or -1.
        position: int64 ``[B]``: the sample's place in the endless order of its data entry. Keys all randomness.
        prepared: What the objectives drew from the batch (masked tokens, patch masks ...), by ``objective/name``.
        captions: The text behind ``token_ids``, for logs and galleries.
    """

    kind: DataKind
    frames: Tensor
    token_ids: Tensor
    identity: Tensor
    label: Tensor
    position: Tensor
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    captions: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of samples, B."""
        return self.frames.shape[0]

    @property
    def num_frames(self) -> int:
        """Number of frames, T; 1 for images."""
        return self.frames.shape[1]

    def check(self) -> None:
        """Asserts the invariants that the chain relies on."""
        assert self.frames.dtype == torch.uint8 and self.frames.dim() == 5 and self.frames.shape[2] == 3
        assert self.token_ids.dtype == torch.int64 and self.token_ids.shape[0] == self.size
        assert is_video(self.kind) or self.num_frames == 1, "an image is a clip of one frame"
        for tensor in (self.identity, self.label, self.position):
            assert tensor.dtype == torch.int64 and tensor.shape == (self.size,)
