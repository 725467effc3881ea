"""What readers of public data sets share: their options, their samples, lists of splits, names of pictures."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, TypeGuard

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import load_json, load_text
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError, Rejection
from omnivl.errors import DataError

MakeEntry = Callable[[], Entry]
"""Makes one sample of what was read; it may raise a ``BadSampleError``."""

_SPLITS = ("train", "validation", "validate", "valid", "val", "dev", "testdev", "test")


@dataclass(frozen=True)
class FormReader(ABC):
    """Reads the files of one public data set, or of several that publish the same form.

    Its fields are the arguments and options of its command (`launcher/commands/data_convert.py`), its docstring is the
    help: paths without a default are arguments in their order, the others options.

    Attributes:
        split: Split of all samples; without it the one that the input names.
    """

    form: ClassVar[str]
    """Name of the command and in the manifest."""
    title: ClassVar[str]
    """Name of the data set in messages."""
    known: ClassVar[str]
    """All fields that its files have, also those that nobody needs; others are named in a warning."""

    split: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """What makes each sample, in an order that depends only on the input.

        Args:
            read: Opens the files.

        Raises:
            DataError: The input as a whole cannot be used.
        """

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Everything that is read, but for a folder of pictures, which are opened by name."""
        given = [getattr(self, one.name) for one in fields(self) if one.name != "images"]
        return tuple(path for one in given for path in (one if isinstance(one, tuple) else (one,)) if _is_path(path))

    def count(self) -> int:
        """Number of samples before any is looked at, with what is left out already."""
        read = self._reading()
        return sum(1 for _ in self.samples(read)) + len(read.drain())

    def entries(self) -> Iterator[Entry | Rejection]:
        """Samples and what was left out, in the input's order.

        Raises:
            DataError: The input as a whole cannot be used.
        """
        images = getattr(self, "images", None)
        if images is not None and not images.is_dir():
            raise DataError(f"{images} is no folder; give the folder of the pictures")
        read = self._reading()
        for make in self.samples(read):
            yield from read.drain()
            try:
                yield make()
            except BadSampleError as error:
                read.leave_out(error.rejection)
        yield from read.drain()
        read.warn()

    def _reading(self) -> Reading:
        return Reading(self.title, frozenset(self.known.split()))


@dataclass(frozen=True)
class ListedReader(FormReader):
    """Reads a form whose splits are lists of identifiers in files of their own.

    Attributes:
        lists: List of the identifiers of a split, one on a line, as JSON, or in a CSV's column video_id. Its name says
            the split (train.txt). Can be repeated; what is in none is left out. Without any, all samples are taken.
    """

    lists: tuple[Path, ...] = field(default=(), kw_only=True)

    def splits(self, read: Reading) -> "SplitLists":
        """The lists, read."""
        return SplitLists(read, self.lists, self.split)


class SplitLists:
    """Splits by identifier.

    Args:
        read: Opens the files.
        files: The lists.
        split: Split of all samples, whatever the lists' names are.

    Raises:
        DataError: A list cannot be read.
    """

    def __init__(self, read: Reading, files: Sequence[Path], split: str | None) -> None:
        self._files = files
        self._split = split
        self._splits: dict[str, str] = {}
        for file in files:
            for identifier in _identifiers(read, file):
                self._splits.setdefault(identifier, split_of(file.stem) or file.stem)

    def of(self, identifier: object, record: Record) -> str | None:
        """The split of a sample.

        Raises:
            BadSampleError: It is in none of the lists.
        """
        if self._files and str(identifier) not in self._splits:
            names = ", ".join(file.name for file in self._files)
            record.refuse("missing_field", f"{identifier!r} is in none of the lists {names}")
        return self._split or self._splits.get(str(identifier))


def _identifiers(read: Reading, file: Path) -> list[str]:
    if file.suffix == ".csv":
        return [str(row.get("video_id") or "").strip() for row in read.table(file, ("video_id",))]
    if file.suffix != ".json":
        return load_text(file).split()
    found = load_json(file)
    if not isinstance(found, list) or not all(isinstance(one, str | int) for one in found):
        raise DataError(f"{file}: allowed: a list of identifiers; give another one")
    return [str(one) for one in found]


def split_of(name: str) -> str | None:
    """The split that a file's name says: ``snli_ve_train``, ``val_1``, ``testdev_balanced_questions``."""
    return next((word for word in re.split(r"[^A-Za-z]+", name.lower()) if word in _SPLITS), None)


def picture(images: Path, *names: str) -> Path:
    """The first of some paths below a folder that exists; the first one where none does."""
    paths = [images / name for name in names]
    return next((path for path in paths if exists(path)), paths[0])


def exists(path: Path) -> bool:
    """Whether a file is there, whatever its name is made of."""
    try:
        return path.is_file()
    except OSError:  # longer than names may be
        return False


def _is_path(value: object) -> TypeGuard[Path]:
    return isinstance(value, Path)
