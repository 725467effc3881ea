"""Pictures and clips without anything beside them, as the chain takes them outside of training."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Images or clips.

    Attributes:
        frames: uint8 ``[B, T, 3, H, W]``; T = 1 for images.
        grids: int64 ``[B, 2]`` where they keep their sizes; see ``Batch``.
    """

    frames: Tensor
    grids: Tensor | None = None

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
    def fields(self) -> dict[str, Tensor]:
        """Their fields of ``State``."""
        return {"frames": self.frames} | ({} if self.grids is None else {"grids": self.grids})

    def to(self, device: torch.device) -> "Pictures":
        """The same on a device."""
        return Pictures(self.frames.to(device), None if self.grids is None else self.grids.to(device))
