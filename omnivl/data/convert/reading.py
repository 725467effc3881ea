"""One pass over annotation files: how they are opened, what is left out, which fields nobody knows."""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from omnivl.data.convert.lists import Row, load_json, read_json_lines, read_list
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError, Rejection
from omnivl.errors import DataError
from omnivl.shown import printable

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

    def keyed(self, records: Iterable[Record], *names: str) -> dict[tuple[str | int, ...], Record]:
        """Records by one identifier or several; those without are left out."""
        found: dict[tuple[str | int, ...], Record] = {}
        for record in records:
            try:
                found[tuple(record.identifier(name) for name in names)] = record
            except BadSampleError as error:
                self.leave_out(error.rejection)
        return found

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
