"""Decodes pictures and clips, after checking their size.

Shapes: T frames, H x W pixels. Results are uint8, RGB; what is transparent shows white.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnivl.data.animated import count_frames, decode_frames
from omnivl.data.augment import evaluation_view
from omnivl.data.config import FrameSamplingConfig, LoaderConfig
from omnivl.data.formats import (
    MEDIA_EXTENSIONS,
    PictureFormat,
    is_clip,
    is_complete,
    may_move,
    picture_format,
    picture_size,
)
from omnivl.data.frames import ChooseFrames, Whole, sample_frames, wanted_frames
from omnivl.data.gpu_decode import jpeg_on_gpu
from omnivl.data.jpeg import SHRINKS, decode_jpeg, in_print_colours
from omnivl.data.limits import DecodeLimits, check_wanted
from omnivl.data.orientation import picture_orientation, turned_size, upright, upright_size
from omnivl.data.png import still_png
from omnivl.data.sizes import Size, SizeOf
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.data.transparency import bgra_on_white
from omnivl.data.video import decode_video

Pixels = NDArray[np.uint8]

Reduction = Callable[[int, int], float]
"""By what both sides of a picture, of which (width, height) are given upright, may be divided."""


@dataclass(frozen=True)
class Header:
    """What the header of a checked picture says.

    Attributes:
        kind: Its format.
        size: (width, height) as it is stored.
        orientation: 1 to 8; of a picture that may move 1, as its decoder turns it.
    """

    kind: PictureFormat
    size: tuple[int, int]
    orientation: int

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height), upright."""
        return turned_size(self.size, self.orientation)

    def shrink(self, reduction: Reduction) -> int:
        """By what the sides are divided when the picture is decoded: one of ``SHRINKS``, of a JPEG alone above 1."""
        if self.kind != "jpeg":
            return 1
        allowed = reduction(*self.shown)
        return next((one for one in SHRINKS if one <= allowed), 1)


def read_header(sample: Sample, limits: DecodeLimits) -> Header:
    """The header of a picture that has ``media``.

    Raises:
        BadSampleError: See ``decode_still``.
    """
    media = _media(sample)
    size = check_picture(media, limits, sample.where)
    kind = picture_format(media)
    assert kind is not None, "it has been checked"
    with naming("broken_image", sample.where):
        return Header(kind, size, 1 if may_move(media) else picture_orientation(media))


def decode_still(sample: Sample, limits: DecodeLimits, needed: int = 0, device: str | None = None) -> Pixels:
    """Decodes a picture to ``[1, H, W, 3]``.

    Args:
        sample: With ``media`` or ``frames`` (of which the first is taken).
        limits: Bounds.
        needed: Shorter side, in pixels, that is sufficient: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size if
            both sides remain at least that long. 0 decodes in full.
        device: See ``decode_shrunk``.

    Raises:
        BadSampleError: ``broken_image``, ``too_many_pixels`` or ``unknown_extension``.
    """
    if sample.frames is not None:
        return sample.frames[:1]
    header = read_header(sample, limits)
    shrink = 1 if needed == 0 else header.shrink(lambda width, height: min(width, height) / needed)
    return decode_shrunk(sample, header, limits, shrink, device)


def decode_shrunk(
    sample: Sample, header: Header, limits: DecodeLimits, shrink: int, device: str | None = None
) -> Pixels:
    """Decodes a picture whose header is known to ``[1, H, W, 3]``.

    Args:
        sample: With ``media``.
        header: See ``read_header``.
        limits: Bounds on the size that the decoder itself finds.
        shrink: See ``Header.shrink``.
        device: The GPU that decodes JPEGs, in full; None for the CPU.

    Raises:
        BadSampleError: ``broken_image`` or ``too_many_pixels``.
    """
    media = _media(sample)
    with naming("broken_image", sample.where):
        if header.kind == "jpeg" and device is not None and header.orientation == 1 and not in_print_colours(media):
            pixels = jpeg_on_gpu(media, device)
        elif header.kind == "jpeg":
            pixels = decode_jpeg(media, shrink, limits, sample.where)
        elif may_move(media):
            return decode_frames(media, header.size, [0], limits, sample.where)
        else:
            pixels = to_rgb(stored_pixels(media))
        return upright(pixels[None], header.orientation)


def check_picture(media: bytes, limits: DecodeLimits, where: str) -> tuple[int, int]:
    """Checks a picture, moving or not, before anything of it is decoded.

    Returns:
        (width, height) as it is stored.

    Raises:
        BadSampleError: ``broken_image`` or ``too_many_pixels``.
    """
    kind, size = picture_format(media), picture_size(media)
    if kind is None or size is None:
        raise BadSampleError("broken_image", where, f"no known picture header in {len(media)} bytes")
    limits.check_size(size, where)
    if not is_complete(media):
        raise BadSampleError("broken_image", where, f"the {kind} file ends early, at {len(media)} bytes")
    return size


def stored_pixels(media: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """A PNG, BMP or still WebP as it is stored: grey ``[H, W]``, BGR or BGRA ``[H, W, C]``, of 8 or 16 bits.

    Raises:
        ValueError: It cannot be decoded.
    """
    kind = picture_format(media)
    if kind == "png":
        media = still_png(media)
    old_bitmap = kind == "bmp" and media[14:18] == b"\x0c\0\0\0"  # OS/2: OpenCV would take it for grey
    how = cv2.IMREAD_COLOR if old_bitmap else cv2.IMREAD_UNCHANGED
    pixels: NDArray[np.uint8] | NDArray[np.uint16] | None = cv2.imdecode(np.frombuffer(media, dtype=np.uint8), how)
    if pixels is None:
        raise ValueError(f"the {kind} data cannot be decoded")
    return _with_grey_key(pixels, media) if kind == "png" and pixels.ndim == 2 else pixels


def decode_clip(
    sample: Sample,
    limits: DecodeLimits,
    choose: ChooseFrames,
    whole: Whole | None = None,
    device: str | None = None,
) -> Pixels:
    """Decodes the chosen frames of a clip to ``[T, H, W, 3]``; a picture that does not move is a clip of one frame.

    Args:
        sample: With ``media`` or ``frames``.
        limits: Bounds.
        choose: The frames wanted.
        whole: Whether to decode all frames instead; None for never.
        device: The GPU that decodes videos; None for the CPU.

    Raises:
        BadSampleError: ``broken_video``, ``broken_image``, ``too_many_pixels``, ``too_many_frames`` or
            ``unknown_extension``.
    """
    if sample.frames is not None:
        return sample.frames[choose(len(sample.frames))]
    media = _media(sample)
    if picture_format(media) is None:
        return decode_video(media, sample.where, limits, choose, whole, device)
    if not is_clip(sample.extension, media):
        picture = decode_still(sample, limits)[0]
        size = (picture.shape[1], picture.shape[0])
        wanted = wanted_frames(1, size, choose, whole)
        check_wanted(len(wanted), size, sample.where)
        return np.stack([picture] * len(wanted))
    size = check_picture(media, limits, sample.where)
    with naming("broken_image", sample.where):
        wanted = wanted_frames(count_frames(media, limits, sample.where), size, choose, whole)
        return decode_frames(media, size, wanted, limits, sample.where)


def decode_mask(sample: Sample, name: str, picture: bytes | None, limits: DecodeLimits) -> NDArray[np.bool_]:
    """Decodes a mask to bool ``[H, W]``, upright: pixels that are not black are inside.

    A mask that says no orientation itself is turned with its picture. It is not if it is tall and the picture is tall
    only when turned, or both are wide: then somebody has turned it already.

    Args:
        sample: With the mask among its ``members``.
        name: The mask's.
        picture: The file of the picture to which it belongs, if there is one.
        limits: Bounds.

    Raises:
        BadSampleError: ``broken_image`` or ``too_many_pixels``.
    """
    media = sample.members[name]
    size = picture_size(media)
    limits.check_size(size or (0, 0), f"{sample.where}.{name}")
    with naming("broken_image", sample.where):
        pixels = None
        if size is not None and is_complete(media):
            with suppress(ValueError):
                pixels = stored_pixels(media)  # neither turned by OpenCV, nor rounded to 8 bits
        if size is None or pixels is None:
            raise BadSampleError("broken_image", sample.where, f"{name}: no picture that can be decoded")
        inside: NDArray[np.bool_] = pixels > 0 if pixels.ndim == 2 else np.any(pixels[:, :, :3] > 0, axis=2)
        turn = picture_orientation(media)
        if turn == 1 and picture is not None:
            turn = picture_orientation(picture)
            wide, high = picture_size(picture) or size
            if turn >= 5 and (size[0] - size[1]) * (wide - high) < 0:
                turn = 1
        return upright(inside[None, :, :, None], turn)[0, :, :, 0]


def still_size(sample: Sample, size: SizeOf) -> Size | None:
    """The size of the view of a picture that has not been decoded; None where its header does not say its own."""
    if isinstance(size, int):
        return size
    if sample.frames is not None:
        return size(sample.frames.shape[2], sample.frames.shape[1])
    stored = None if sample.media is None else picture_size(sample.media)
    return None if stored is None or sample.media is None else size(*upright_size(stored, sample.media))


@dataclass(frozen=True)
class Shot:
    """The part of a clip or picture that an evaluation looks at, by default its middle.

    Attributes:
        span: Share of the clip from which frames are taken.
        start: Where this share lies, from 0 (at the beginning) to 1.
        along: Where the square lies along the longer side of the picture, from 0 (left or top) to 1.
    """

    span: float = 1.0
    start: float = 0.5
    along: float = 0.5


MIDDLE = Shot()


def evaluation_frames(
    sample: Sample,
    size: SizeOf,
    num_frames: int,
    config: LoaderConfig,
    shot: Shot = MIDDLE,
    device: str | None = None,
) -> Tensor:
    """The plain view of a sample: uniform frames, resized, squares cropped; nothing random.

    Args:
        sample: A still or a clip.
        size: Of the view in pixels.
        num_frames: Frames wanted; with 1, a clip gives its middle frame.
        config: Bounds of decoding.
        shot: Which part is looked at.
        device: The GPU that decodes JPEGs and videos; None for the CPU.

    Returns:
        uint8 ``[num_frames, 3, h, w]``, on the CPU.

    Raises:
        BadSampleError: See ``decode_still`` and ``decode_clip``.
        DataError: The GPU has failed.
    """
    limits, own = DecodeLimits(config.max_pixels, config.max_frames), still_size(sample, size)
    if num_frames == 1 and sample.frames is None and not is_clip(sample.extension, sample.media or b""):
        pixels = decode_still(sample, limits, 0 if own is None else least_side(own), device)
    else:
        frames, start = FrameSamplingConfig(span=shot.span), shot.start
        pixels = decode_clip(
            sample, limits, lambda total: sample_frames(total, num_frames, frames, None, start), device=device
        )
    if own is None:
        assert not isinstance(size, int)
        own = size(pixels.shape[2], pixels.shape[1])
    return torch.from_numpy(np.ascontiguousarray(evaluation_view(pixels, own, shot.along).pixels.transpose(0, 3, 1, 2)))


def least_side(size: Size) -> int:
    """The shorter side of a view, in pixels."""
    return size if isinstance(size, int) else min(size)


def _media(sample: Sample) -> bytes:
    if sample.extension not in MEDIA_EXTENSIONS:
        known = ", ".join(sorted(MEDIA_EXTENSIONS))
        raise BadSampleError("unknown_extension", sample.where, f".{sample.extension} is not read; known: {known}")
    assert sample.media is not None, "a sample has media or frames"
    return sample.media


def _with_grey_key(
    pixels: NDArray[np.uint8] | NDArray[np.uint16], media: bytes
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Adds the alpha of a grey PNG with a transparent value (``tRNS``), which OpenCV leaves out."""
    found = media.find(b"\0\0\0\2tRNS", 33, max(33, media.find(b"IDAT")))
    if found < 0:
        return pixels
    depth = media[24]
    key = int.from_bytes(media[found + 8 : found + 10], "big") & ((1 << depth) - 1)
    key = key * 255 // ((1 << depth) - 1) if depth < 8 else key  # OpenCV widens 1, 2 and 4 bits to 8
    alpha = np.where(pixels == key, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    return np.stack([pixels, pixels, pixels, alpha], axis=2)


def to_rgb(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Pixels:
    """OpenCV's grey, BGR or BGRA of 8 or 16 bits to RGB on white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)  # type: ignore[no-any-return]
    if pixels.shape[2] == 4:
        return bgra_on_white(cast("Pixels", pixels))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[no-any-return]
