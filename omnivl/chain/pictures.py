"""Pictures, clips and sets of pictures without anything beside them, as the chain takes them outside of training."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnivl.data.batch import DataKind


@dataclass(frozen=True)
class Pictures:
    """Images, clips or sets of images.

    Attributes:
        frames: uint8 ``[B, T, 3, H, W]``; T = 1 for images, P for sets.
        grids: int64 ``[B, 2]`` where they keep their sizes; see ``Batch``.
        are_sets: Whether each has several images rather than the frames of a clip.
    """

    frames: Tensor
    grids: Tensor | None = None
    are_sets: bool = False

    @classmethod
    def of(cls, given: "Tensor | Pictures") -> "Pictures":
        """Frames of one size, or what is whole already."""
        return given if isinstance(given, Pictures) else cls(given)

    def __len__(self) -> int:
        """B."""
        return len(self.frames)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.frames.device

    @property
    def kind(self) -> DataKind:
        """The kind of samples with texts that show the like."""
        return "images_text" if self.are_sets else "image_text" if self.frames.shape[1] == 1 else "video_text"

    @property
    def fields(self) -> dict[str, Tensor]:
        """Their fields of ``State``."""
        return {"frames": self.frames} | ({} if self.grids is None else {"grids": self.grids})

    def to(self, device: torch.device) -> "Pictures":
        """The same on a device."""
        grids = None if self.grids is None else self.grids.to(device)
        return replace(self, frames=self.frames.to(device), grids=grids)
