"""How large pictures and clips may be: what is checked before anything is decoded.

The bounds on time and memory of a whole clip do not depend on the configuration: a file of some kilobytes can ask for
any number of large frames.
"""

from dataclasses import dataclass

from omnivl.data.sources.base import BadSampleError

MAX_PIXELS = 40_000_000
MAX_FRAMES = 20_000
_MAX_WANTED = 400_000_000  # pixels that are held, 1.2 GB
_MAX_DECODED = {"video": 20_000_000_000, "picture": 1_000_000_000}  # pixels; half a minute or so on one core
PATIENCE = 10
"""How many times longer conversion may take for a clip than training: it scales down what training refuses."""
_REMEDY = "scale it down (`omnivl data convert --shorter-side`) or leave it out"


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds that are checked before anything is decoded.

    Attributes:
        max_pixels: Pixels per picture or frame.
        max_frames: Frames per clip.
    """

    max_pixels: int = MAX_PIXELS
    max_frames: int = MAX_FRAMES

    def check_size(self, size: tuple[int, int], where: str) -> None:
        """Checks the (width, height) of a picture or frame.

        Raises:
            BadSampleError: ``too_many_pixels``.
        """
        if size[0] * size[1] > self.max_pixels:
            detail = f"{size[0]} x {size[1]} pixels; allowed: {self.max_pixels} in all"
            raise BadSampleError("too_many_pixels", where, detail)

    def check_frames(self, total: int, where: str) -> None:
        """Checks the number of frames of a clip.

        Raises:
            BadSampleError: ``too_many_frames``.
        """
        if total > self.max_frames:
            raise BadSampleError("too_many_frames", where, f"{total} frames; allowed: {self.max_frames}")


DEFAULT_LIMITS = DecodeLimits()


def check_wanted(wanted: int, size: tuple[int, int], where: str) -> None:
    """Checks that the frames wanted of a clip can be held.

    Raises:
        BadSampleError: ``too_many_pixels``.
    """
    if wanted * size[0] * size[1] > _MAX_WANTED:
        detail = f"{wanted} frames of {size[0]} x {size[1]} pixels at once; allowed: {_MAX_WANTED} pixels; {_REMEDY}"
        raise BadSampleError("too_many_pixels", where, detail)


def check_work(decoded: int, size: tuple[int, int], where: str, *, moving: str, patience: int = 1) -> None:
    """Checks that the frames to be decoded for the wanted ones take bounded time.

    Args:
        decoded: Their number.
        size: (width, height) of each.
        where: ``SHARD:KEY``.
        moving: ``video`` or ``picture``: what moves. Frames of moving pictures are painted one over the other, which
            takes ten times as long.
        patience: How many times longer it may take.

    Raises:
        BadSampleError: ``too_many_frames``.
    """
    most = patience * _MAX_DECODED[moving]
    if decoded * size[0] * size[1] > most:
        detail = f"{decoded} frames of {size[0]} x {size[1]} pixels to decode; allowed: {most} pixels; {_REMEDY}"
        raise BadSampleError("too_many_frames", where, detail)
