"""What readers of public annotation files share: how files are opened, what is left out, what is named once."""

import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, TypeGuard

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import Row, load_json, load_text, read_json_lines, read_list
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError, Rejection
from omnivl.errors import DataError
from omnivl.shown import printable

MakeEntry = Callable[[], Entry]
"""Makes one sample of what was read; it may raise a ``BadSampleError``."""

_SPLITS = ("train", "validation", "validate", "valid", "val", "dev", "testdev", "test")
_NAMED = 20  # unknown fields in a warning


class Reading:
    """One pass over the files of a form. Bad objects are kept aside, fields that nobody knows are counted.

    Args:
        title: The form, for messages.
        known: All fields that objects of its files may have.
    """

    def __init__(self, title: str, known: frozenset[str]) -> None:
        self.title = title
        self._known = known
        self._unknown: dict[Path, Counter[str]] = {}
        self._rejected: list[Rejection] = []

    def drain(self) -> list[Rejection]:
        """What was left out since the last call, in order."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def leave_out(self, rejection: Rejection) -> None:
        """Counts a bad object."""
        self._rejected.append(rejection)

    def warn(self) -> None:
        """Names the fields that were found and are not known, once for each file."""
        for file, counts in self._unknown.items():
            names = ", ".join(f"{name!r} ({count})" for name, count in sorted(counts.items())[:_NAMED])
            more = f" and {len(counts) - _NAMED} others" if len(counts) > _NAMED else ""
            warnings.warn(
                printable(
                    f"{file}: fields that files of {self.title} are not known to have are not read: {names}{more}"
                ),
                stacklevel=4,
            )

    def top(self, file: Path) -> Record:
        """The object that a whole JSON file is.

        Raises:
            DataError: The file cannot be read or holds something else.
        """
        return self.record(file, "", self._object(file))

    def objects(self, file: Path) -> Iterator[Record]:
        """The objects of a file that is one list, or has an object on each line, by its first letter.

        Raises:
            DataError: It cannot be read.
        """
        with file.open("rb") as opened:
            first = opened.readline().removeprefix(b"\xef\xbb\xbf").strip()
            while first == b"" and (line := opened.readline()):
                first = line.strip()
        if first.startswith(b"["):
            rows = load_json(file)
            assert isinstance(rows, list), "it begins as one"
            return self._each(file, "", rows)
        if first in (b"", b"{"):
            raise DataError(
                f"{file}: neither a list nor an object on each line; allowed: a file of {self.title}; give another one"
            )
        return self._rows(file, read_json_lines(file))

    def table(self, file: Path, columns: Sequence[str]) -> Iterator[Record]:
        """The rows of a CSV or TSV table.

        Raises:
            DataError: It is none, or lacks a column.
        """
        return self._rows(file, read_list(file, columns))

    def by_name(self, file: Path) -> Iterator[tuple[str, Record]]:
        """The objects of a file that is one object of them, with their names.

        Raises:
            DataError: The file cannot be read or holds something else.
        """
        for name, value in self._object(file).items():
            for record in self._each(file, f":{name}", [value], numbered=False):
                yield name, record

    def listed(self, top: Record, name: str) -> Iterator[Record]:
        """The objects of a list at the top of a file.

        Raises:
            DataError: There is no such list.
        """
        return self._each(top.file, f"{top.place}.{name}" if top.place else f":{name}", self.needed(top, name))

    def needed(self, top: Record, name: str) -> list[object]:
        """A list at the top of a file.

        Raises:
            DataError: There is none.
        """
        rows = top.get(name)
        if not isinstance(rows, list):
            at = f"in {top.place[1:]!r}" if top.place else "at the top"
            raise DataError(f"{top.file}: no list {name!r} {at}; allowed: a file of {self.title}; give another one")
        return rows

    def inside(self, record: Record, name: str) -> Iterator[Record]:
        """The objects of a list that a record holds.

        Raises:
            BadSampleError: It has no such list.
        """
        return self._each(record.file, f"{record.place}.{name}", record.values(name))

    def parts(self, record: Record, name: str) -> Iterator[Record]:
        """The objects of a list, each of which becomes a sample; where there is none, the record is left out."""
        return self._each(record.file, f"{record.place}.{name}", self.values(record, name))

    def values(self, record: Record, name: str) -> list[object]:
        """A list of which each value becomes a sample; where there is none, or an empty one, the record is left out."""
        try:
            values = record.values(name)
            return values or record.wrong(name, "a list that is not empty")
        except BadSampleError as error:
            self.leave_out(error.rejection)
            return []

    def within(self, record: Record, name: str) -> Record:
        """The object that a record holds; an empty one where it holds none.

        Raises:
            BadSampleError: It holds something else.
        """
        value = record.get(name)
        if value is not None and not isinstance(value, dict):
            record.wrong(name, "an object")
        return self.record(record.file, f"{record.place}.{name}", value or {})

    def records(self, file: Path, values: Sequence[object]) -> Iterator[Record]:
        """The objects of a list that was read otherwise."""
        return self._each(file, "", values)

    def record(self, file: Path, place: str, fields: Mapping[str, object]) -> Record:
        """An object that was read otherwise."""
        unknown = [str(name) for name in fields if name not in self._known]
        if unknown:
            self._unknown.setdefault(file, Counter()).update(unknown)
        return Record(file, place, fields)

    def _object(self, file: Path) -> dict[str, object]:
        found = load_json(file)
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise DataError(f"{file}: holds a {kind}; allowed: the object of a file of {self.title}; give another one")
        return found

    def _each(self, file: Path, place: str, values: Sequence[object], numbered: bool = True) -> Iterator[Record]:
        for number, value in enumerate(values):
            at = f"{place}[{number}]" if numbered else place
            if isinstance(value, dict):
                yield self.record(file, at, value)
            else:
                kind = type(value).__name__
                self.leave_out(Rejection("wrong_json", f"{file}{at}", f"is a {kind}; allowed: an object"))

    def _rows(self, file: Path, rows: Iterator[Row | Rejection]) -> Iterator[Record]:
        for row in rows:
            if isinstance(row, Rejection):
                self.leave_out(row)
            else:
                yield self.record(file, row[0].removeprefix(str(file)), row[1])


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
    return next((path for path in paths if path.is_file()), paths[0])


def _is_path(value: object) -> TypeGuard[Path]:
    return isinstance(value, Path)
