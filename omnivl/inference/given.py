"""Pictures, clips and texts that a program gives, instead of a data source: checked, and made into samples.

Pixels become the view of evaluation, so that a file gives the same tensor here as in ``omnivl evaluate``, to the last
bit.

Shapes: N samples, T frames, H x W pixels, S side of a view.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnivl.data.config import FrameSamplingConfig, LoaderConfig
from omnivl.data.decode import Pixels, evaluation_frames
from omnivl.data.formats import picture_format, picture_size
from omnivl.data.frames import sample_frames
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.orientation import tagged_orientation, upright
from omnivl.data.plain_files import check_plain_file
from omnivl.data.sizes import SizeOf
from omnivl.data.sources.base import BadSampleError, Sample, naming
from omnivl.data.transparency import on_white
from omnivl.errors import DataError

Picture = Image.Image | Pixels | Tensor | bytes | str | Path
"""A picture: decoded, in RGB, where PIL's is turned upright by its EXIF; or the content or the path of its file.

Tensors are uint8 ``[3, H, W]``, arrays uint8 ``[H, W, 3]``."""

Clip = Sequence[Image.Image | Pixels | Tensor] | Pixels | Tensor | bytes | str | Path
"""A clip: a sequence of frames; one array ``[T, H, W, 3]`` or tensor ``[T, 3, H, W]``; or its file."""

LARGEST_FILE = 1 << 30
"""Bytes of a picture's or clip's file, which is read whole."""

LONGEST_TEXT = 100_000
"""Characters of a text; a model reads some dozens of words."""

_REMEDIES = {
    "too_many_frames": "give a part of it, as ffmpeg -ss 0 -t 60 -i FILE PART cuts one out",
    "too_many_pixels": "scale it down",
}
_OTHER_REMEDY = "give a picture or clip of a known format"
_PICTURES = "PIL images, uint8 arrays [H, W, 3], uint8 tensors [3, H, W], files and their bytes"
_CLIPS = "lists of frames, uint8 arrays [T, H, W, 3], uint8 tensors [T, 3, H, W], files and their bytes"


def each_picture(given: Any) -> Iterator[Any]:
    """The pictures of what may be one picture, several, or an array or tensor of several."""
    if isinstance(given, np.ndarray | Tensor):
        yield from given if given.ndim == 4 else [given]
    elif isinstance(given, Iterable) and not isinstance(given, bytes | str | Image.Image):
        yield from given
    else:
        yield given


def each_clip(given: Any) -> Iterator[Any]:
    """The clips of what may be one clip or several; a sequence of frames is one, a sequence of such sequences several.

    An array or tensor with five dimensions is several.
    """
    if isinstance(given, np.ndarray | Tensor):
        yield from given if given.ndim == 5 else [given]
    elif isinstance(given, Iterable) and not isinstance(given, bytes | str | Image.Image):
        several = iter(given)
        for first in several:
            yield [first, *several] if _is_frame(first) else first
    else:
        yield given


def picture_view(picture: Any, size: SizeOf, where: str = "picture", least: int = 1) -> Tensor:
    """The view of a picture.

    Args:
        picture: See ``Picture``. A clip's file gives its middle frame.
        size: Of the view.
        where: What it is called in messages.
        least: Pixels that its shorter side has at least.

    Returns:
        uint8 ``[1, 3, h, w]``.

    Raises:
        DataError: It cannot be read, has another type or shape, or fewer pixels than ``least`` on a side.
    """
    if isinstance(picture, bytes | str | Path):
        return _file_view(picture, size, 1, where, least)
    return _pixels_view(_pixels(picture, where, least)[None], size, where)


def clip_view(clip: Any, size: SizeOf, num_frames: int, where: str = "clip", least: int = 1) -> Tensor:
    """The view of a clip: evenly spaced frames, of which a short clip repeats some.

    Args:
        clip: See ``Clip``.
        size: Of the view.
        num_frames: T.
        where: What it is called in messages.
        least: Pixels that its shorter side has at least.

    Returns:
        uint8 ``[T, 3, h, w]``.

    Raises:
        DataError: It cannot be read, has no frames or too many, or one of another type or shape.
    """
    if isinstance(clip, bytes | str | Path):
        return _file_view(clip, size, num_frames, where, least)
    is_array = isinstance(clip, np.ndarray | Tensor)
    if (is_array and clip.ndim != 4) or not (is_array or isinstance(clip, Sequence)):
        raise DataError(f"{where}: got {_said_of(clip)}; allowed are {_CLIPS}; convert it")
    total, most = len(clip), DEFAULT_LIMITS.max_frames
    if not 0 < total <= most:
        change = "leave it out" if total == 0 else "give a part of it"
        raise DataError(f"{where}: got a clip of {total:,} frames; allowed are 1 to {most:,}; {change}")
    chosen = sample_frames(total, num_frames, FrameSamplingConfig(), None)
    frames = [_pixels(clip[number], f"{where}, frame {number}", least) for number in chosen]
    if len(shapes := {frame.shape[:2] for frame in frames}) > 1:
        (height, width), (other_height, other_width), *_ = sorted(shapes)
        raise DataError(
            f"{where}: got frames of {width} x {height} and of {other_width} x {other_height} pixels; allowed are "
            "frames of one size; resize them"
        )
    return _pixels_view(np.stack(frames), size, where)


def given_sample(view: Tensor, where: str) -> Sample:
    """A view ``[T, 3, h, w]`` as a sample of a ``PictureSet`` of the same sizes, which shows it as it is.

    Args:
        view: From ``picture_view`` or ``clip_view``.
        where: What it is called in messages.
    """
    frames: Pixels = view.permute(0, 2, 3, 1).contiguous().numpy()
    return Sample(where, where, frames=frames)


def given_texts(given: Any, name: str) -> list[str]:
    """One text or several as a list.

    Args:
        given: A text, or texts one after the other.
        name: What they are called in messages.

    Raises:
        DataError: There are none, or one of them is no text, empty or very long.
    """
    if isinstance(given, str):
        given = [given]
    texts = list(given) if isinstance(given, Iterable) else [given]
    for place, text in enumerate(texts):
        where = f"{name}[{place}]"
        if not isinstance(text, str):
            raise DataError(f"{where}: got {_said_of(text)}; allowed are texts; convert it with str()")
        if not text.strip():
            raise empty_text(where, text)
        if len(text) > LONGEST_TEXT:
            raise DataError(f"{where}: got {len(text):,} characters; allowed are {LONGEST_TEXT:,}; shorten it")
    if not texts:
        raise DataError(f"{name}: got none; allowed is at least one text; give one")
    return texts


def empty_text(where: str, text: str) -> DataError:
    """The error for a text without a word."""
    return DataError(f"{where}: got {text[:40]!r}, which has no word; allowed are texts with words; leave it out")


def _is_frame(value: Any) -> bool:
    """Whether an element of a list is a frame, not a whole clip."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3)


def _file_view(file: bytes | str | Path, size: SizeOf, num_frames: int, where: str, least: int) -> Tensor:
    """The view of an encoded picture or clip, ``[num_frames, 3, h, w]``."""
    name = "bytes" if isinstance(file, bytes) else str(file)
    where = name if where in ("picture", "clip") else f"{where}, {name}"
    try:
        media, extension = _read(file)
        if (stored := picture_size(media)) is not None:
            _check_side(min(stored), where, least)
        return evaluation_frames(Sample(where, where, media, extension), size, num_frames, LoaderConfig())
    except BadSampleError as error:
        remedy = _REMEDIES.get(error.rejection.cause, _OTHER_REMEDY)
        raise DataError(f"{where}: cannot be decoded ({error.rejection.detail}); {remedy}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        said = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{where}: cannot be read ({said}); name another file") from error


def _read(file: bytes | str | Path) -> tuple[bytes, str]:
    """The content of a file, and its format by an extension."""
    if isinstance(file, bytes):
        return file, picture_format(file) or "mp4"
    path = Path(file).expanduser()
    check_plain_file(path, LARGEST_FILE)
    return path.read_bytes(), path.suffix.lower().lstrip(".")


def _pixels(picture: Any, where: str, least: int) -> Pixels:
    """``[H, W, 3]`` of a decoded picture.

    Raises:
        DataError: It is of another type or shape, too small, too large or damaged.
    """
    try:
        if isinstance(picture, Image.Image):
            _check_side(min(picture.size), where, least)
            DEFAULT_LIMITS.check_size(picture.size, where)
            with naming("broken_image", where):
                return _pixels_of_pil(picture)
        given: Any = picture
        if isinstance(picture, Tensor) and picture.dim() == 3:
            given = picture.detach().cpu().permute(1, 2, 0).numpy() if picture.dtype == torch.uint8 else picture
        if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
            raise DataError(f"{where}: got {_said_of(picture)}; allowed are {_PICTURES}; convert it")
        _check_side(min(given.shape[:2]), where, least)
        DEFAULT_LIMITS.check_size((given.shape[1], given.shape[0]), where)
        return np.ascontiguousarray(given)
    except BadSampleError as error:
        remedy = _REMEDIES.get(error.rejection.cause, "open or make it again")
        raise DataError(f"{where}: cannot be read ({error.rejection.detail}); {remedy}") from error


def _pixels_of_pil(picture: Image.Image) -> Pixels:
    if picture.has_transparency_data:
        stored: Pixels = on_white(np.asarray(picture.convert("RGBA")))
    else:
        stored = np.asarray(picture.convert("RGB"))
    turned: Pixels = upright(stored[None], tagged_orientation(picture))[0]
    return turned


def _check_side(side: int, where: str, least: int) -> None:
    if side < max(1, least):
        raise DataError(
            f"{where}: got a picture with a side of {side} pixels; allowed are sides of {max(1, least)} or more, as "
            "less shows nothing; give a larger one"
        )


def _pixels_view(pixels: Pixels, size: SizeOf, where: str) -> Tensor:
    """The view ``[T, 3, h, w]`` of ``[T, H, W, 3]``."""
    return evaluation_frames(Sample(where, where, frames=pixels), size, len(pixels), LoaderConfig())


def _said_of(value: Any) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
