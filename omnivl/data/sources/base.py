"""The interface of a source of samples, and the error for bad samples.

Shapes: T frames of a clip, H x W pixels.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError

Cause = Literal[
    "truncated_tar",
    "wrong_archive",
    "empty_shard",
    "unreadable_path",
    "duplicate_key",
    "scattered_members",
    "unusable_member",
    "missing_media",
    "unknown_extension",
    "missing_caption",
    "missing_label",
    "missing_field",
    "wrong_field",
    "invalid_utf8",
    "wrong_json",
    "broken_image",
    "broken_video",
    "too_many_pixels",
    "too_many_frames",
    "unusable",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
MISTAKES = (NameError, AttributeError, TypeError, AssertionError, NotImplementedError, ImportError)
"""What code raises that is wrong. Bad data may raise the same inside a library, but not in a line of this package."""

_PACKAGE = Path(__file__).parents[2]
_MAX_TRACEBACK = 4000  # characters
# Causes of a whole shard.
SHARD_CAUSES: frozenset[Cause] = frozenset({"truncated_tar", "wrong_archive", "empty_shard", "unreadable_path"})


@dataclass(frozen=True)
class Rejection:
    """One line of the quarantine log.

    Attributes:
        cause: Why, from a fixed list, so that causes can be counted.
        where: ``SHARD:KEY``, or the shard alone where no sample can be named.
        detail: What exactly was found.
        traceback: Where it was raised, if nobody foresaw it; the end of it, if it is long.
    """

    cause: Cause
    where: str
    detail: str
    traceback: str = field(default="", compare=False)


class BadSampleError(Exception):
    """A sample cannot be used. The loader counts it by cause, logs it and replaces it by another one."""

    def __init__(self, cause: Cause, where: str, detail: str, traceback: str = "") -> None:
        super().__init__(cause, where, detail, traceback)  # all of them, so that it survives pickling from a worker
        self.rejection = Rejection(cause, where, detail, traceback)

    def __str__(self) -> str:
        return f"{self.rejection.where}: {self.rejection.cause}: {self.rejection.detail}"


class NothingLeftError(DataError):
    """A source can be read, and none of its samples is what an entry asks for: the kind or the filter is wrong."""


@contextmanager
def naming(cause: Cause, where: str) -> Iterator[None]:
    """Turns whatever a decoder, an augmentation or a tokenizer raises into a bad sample that has a name.

    Decoders fail in ways that their documentation does not list (``IndexError``, ``AttributeError``, ``struct.error``).
    Our own mistakes must not pass for bad data, however: an error of a type that wrong code raises (``MISTAKES``), from
    a line of this package itself, goes on, with the sample's name as a note. So do errors that are a user's to mend.

    Args:
        cause: Of what is not a ``BadSampleError`` already.
        where: ``SHARD:KEY`` of the sample.

    Raises:
        BadSampleError: Anything else was raised.
    """
    try:
        yield
    except (BadSampleError, DataError):
        raise
    except Exception as error:
        if isinstance(error, MISTAKES) and _is_own(error):
            note = f"while {where} was read"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        trace = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
        raise BadSampleError(cause, where, f"{type(error).__name__}: {error}", trace) from error


def _is_own(error: BaseException) -> bool:
    """Whether the line that raised an error is in this package; functions written in C have no lines."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1].f_code.co_filename).is_relative_to(_PACKAGE)


@dataclass(frozen=True)
class Sample:
    """One sample of a source. ``media``, ``frames`` or ``members`` hold its pictures, if it has any.

    Attributes:
        key: Name within its shard.
        where: ``SHARD:KEY`` for messages.
        media: The encoded picture or clip.
        extension: Its format by file extension, lower-case, without dot: ``jpg``, ``webp``, ``mp4`` ...
        frames: Decoded pixels uint8 ``[T, H, W, 3]``, RGB, for sources that draw their samples.
        captions: All captions in the wanted language, maybe none for label kinds.
        label: Class name.
        identity: Name of the concept shown; samples with equal identity are positives of each other.
        meta: All other fields of the sample's JSON.
        members: The further files that the data entry names, by the part of their name after the sample's key and a
            dot.
    """

    key: str
    where: str
    media: bytes | None = None
    extension: str = ""
    frames: NDArray[np.uint8] | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    identity: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)


@runtime_checkable
class Measured(Protocol):
    """A source that knows sizes without reading samples."""

    def picture_sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Width and height, upright, of the samples at ``indices [K]``: int64 ``[K, 2]``, 0 where they are unknown.

        Those of a picture whose orientation stands behind its pixels, as in a WebP, may be exchanged.
        """


class Source(Protocol):
    """A finite list of samples that can be read in any order.

    Instances are picklable and open files lazily, per process. The samples in the list (kind, ``where``) are determined
    when the source is opened.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted names of all labels; empty where no sample has one."""

    @property
    def rejections(self) -> Sequence[Rejection]:
        """Bad samples that were found when the source was opened; they are not in the list."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> Sample:
        """The sample at ``index``; a pure function of it.

        Raises:
            BadSampleError: The sample cannot be read.
        """
