"""A CSV, TSV, JSON or JSON-lines list: one row per picture or clip, per caption, or per question."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omnivl.data.convert.boxes import BoxForm
from omnivl.data.convert.entry import Entry, texts_of
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError, did_you_mean

LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")

Row = tuple[str, Mapping[str, object]]


@dataclass(frozen=True)
class TableReader:
    """Reads a list of files with their captions and labels.

    Neighbouring rows that name the same file are one sample with several captions. A ``.json`` list is held in memory;
    the other forms are read line by line.

    Attributes:
        table: The list.
        root: Folder that relative paths start from; None for the list's own.
        path_column: Column with the file's path; None where rows have none.
        caption_columns: Columns with captions; in JSON a value can be a list of captions.
        label_column: Column with the class name.
        identity_column: Column with the name of the concept shown.
        split_column: Column with the split.
        keep: Further columns to carry into the sample's JSON.
        pictures: Columns with paths of further pictures or clips, by what they are called in the shard.
        masks: Likewise of masks.
        boxes: Form of the boxes in pixels that a column holds; they go into the JSON as fractions.
        row_is_sample: Whether each row is a sample, also where its file is that of another row.
    """

    table: Path
    root: Path | None = None
    path_column: str | None = "path"
    caption_columns: tuple[str, ...] = ()
    label_column: str | None = None
    identity_column: str | None = None
    split_column: str | None = None
    keep: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, str] = field(default_factory=dict)
    boxes: Mapping[str, BoxForm] = field(default_factory=dict)
    row_is_sample: bool = False

    @property
    def form(self) -> str:
        """Name of the form."""
        return "table"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The list."""
        return (self.table,)

    def count(self) -> int:
        """Lines of the list, or rows of a JSON list."""
        if self.table.suffix.lower() == ".json":
            return sum(1 for _ in self._rows())
        with self.table.open("rb") as file:
            return sum(1 for _ in file)

    def entries(self) -> Iterator[Entry | Rejection]:
        """Rows in their order, those of one file joined.

        Raises:
            DataError: The list's form is unknown, it is no list, a column is missing, or neither captions nor labels
                nor other columns were asked for.
        """
        if not self._says and not self.keep:
            raise DataError(f"{self.table}: no caption or label column is named; name one (--caption, --label, --keep)")
        waiting: Entry | None = None
        for row in self._rows():
            entry = row if isinstance(row, Rejection) else self._entry(*row)
            if isinstance(entry, Rejection):
                yield entry
            elif waiting is not None and waiting.name == entry.name:
                new = tuple(text for text in entry.captions if text not in waiting.captions)
                waiting = replace(waiting, captions=waiting.captions + new)
            else:
                if waiting is not None:
                    yield waiting
                waiting = entry
        if waiting is not None:
            yield waiting

    def _rows(self) -> Iterator[Row | Rejection]:
        match self.table.suffix.lower():
            case ".csv":
                return read_csv(self.table, self._columns())
            case ".tsv":
                return read_csv(self.table, self._columns(), delimiter="\t")
            case ".jsonl" | ".ndjson":
                return _json_lines(self.table)
            case ".json":
                return _json_list(self.table)
            case other:
                raise DataError(
                    f"{self.table}: lists of the form {other!r} are not read; allowed: {', '.join(LIST_SUFFIXES)}"
                )

    def _columns(self) -> tuple[str, ...]:
        optional = (self.path_column, self.label_column, self.identity_column, self.split_column)
        named = (name for name in optional if name is not None)
        return (*named, *self.caption_columns, *self.keep, *self.pictures.values(), *self.masks.values(), *self.boxes)

    @property
    def _says(self) -> bool:
        """Whether a sample must have a caption or a label."""
        return bool(self.caption_columns) or self.label_column is not None

    def _entry(self, where: str, row: Mapping[str, object]) -> Entry | Rejection:
        paths = {name: _text(row, column) for name, column in {**self.pictures, **self.masks}.items()}
        file = None if self.path_column is None else _text(row, self.path_column)
        if self.path_column is not None and file is None:
            return Rejection("missing_media", where, f"nothing in {self.path_column!r}; write the file's path there")
        captions: list[str] = []
        for column in self.caption_columns:
            texts = texts_of(row.get(column))
            if texts is None:
                found = repr(row[column])[:60]
                return Rejection("wrong_json", where, f"{column!r} is {found}; allowed: a text or a list of texts")
            captions.extend(texts)
        label = None if self.label_column is None else _text(row, self.label_column)
        if self.label_column is not None and label is None and not captions:
            return Rejection(
                "missing_label", where, f"nothing in {self.label_column!r}; write a class name or drop the row"
            )
        if self._says and not captions and label is None:
            wanted = ", ".join(repr(column) for column in self.caption_columns)
            return Rejection("missing_caption", where, f"nothing in {wanted}; write a caption or drop the row")
        root = self.table.parent if self.root is None else self.root
        return Entry(
            path=None if file is None else root / file,
            name=self._name(file or next((path for path in paths.values() if path is not None), None), where),
            where=where,
            captions=tuple(captions),
            label=label,
            identity=None if self.identity_column is None else _text(row, self.identity_column),
            split=None if self.split_column is None else _text(row, self.split_column),
            meta={column: row[column] for column in self.keep if row.get(column) not in (None, "")},
            pictures={name: root / path for name in self.pictures if (path := paths[name]) is not None},
            masks={name: root / path for name in self.masks if (path := paths[name]) is not None},
            boxes={column: (form, row[column]) for column, form in self.boxes.items() if row.get(column)},
        )

    def _name(self, file: str | None, where: str) -> str:
        """The sample's name: its file's, followed by the row's number if several rows may have this file."""
        place = where.removeprefix(str(self.table)).strip(":[]")
        if file is None:
            return f"row-{place}"
        named = Path(file)
        alone = self.path_column is not None and not self.row_is_sample
        return (named if alone else named.with_stem(f"{named.stem}-{place}")).as_posix()


def _text(row: Mapping[str, object], column: str) -> str | None:
    value = row.get(column)
    text = "" if value is None else str(value).strip()
    return text or None


def check_columns(file: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuses a table in which a column is missing.

    Raises:
        DataError: With the columns that exist and the nearest name.
    """
    for column in wanted:
        if column not in found:
            change = did_you_mean(column, found, "name the right one")
            raise DataError(f"{file}:1: no column {column!r}; the columns are {', '.join(map(repr, found))}; {change}")


def read_csv(file: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[Row | Rejection]:
    """Rows of a table with a header line, each with ``FILE:LINE``.

    Raises:
        DataError: A column is missing, or the file has no header.
    """
    csv.field_size_limit(1 << 24)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            header = reader.fieldnames
        except csv.Error as error:
            raise DataError(f"{file}:1: {error}; write a header line with the names of the columns") from error
        if header is None:
            raise DataError(f"{file}: the file is empty; write a header line with the names of the columns")
        check_columns(file, header, columns)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Rejection("wrong_json", f"{file}:{reader.line_num}", f"no CSV row: {error}; mend its quotes")
                continue
            where = f"{file}:{reader.line_num}"
            if None in row:
                extra = len(row[None]) + len(header)  # surplus values are under the key None
                detail = f"{extra} fields for {len(header)} columns; put texts that have a {delimiter!r} in quotes"
                yield Rejection("wrong_json", where, detail)
            elif any("\udc80" <= letter <= "\udcff" for value in row.values() if value for letter in value):
                yield Rejection("invalid_utf8", where, "the row is not UTF-8; save the file as UTF-8")
            else:
                yield where, row


def _json_lines(file: Path) -> Iterator[Row | Rejection]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Rejection("invalid_utf8", where, f"byte at offset {error.start}; save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                yield Rejection("wrong_json", where, f"{error}; write one JSON object per line")
            else:
                yield _checked(row, where)


def _json_list(file: Path) -> Iterator[Row | Rejection]:
    rows = load_json(file)
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise DataError(
            f"{file}: the file holds a {kind}; allowed: a list of objects (COCO captions have their own form)"
        )
    for number, row in enumerate(rows):
        yield _checked(row, f"{file}[{number}]")


def _checked(row: object, where: str) -> Row | Rejection:
    if isinstance(row, dict):
        return where, row
    return Rejection("wrong_json", where, f"the row is a {type(row).__name__}; allowed: an object")


def load_json(file: Path) -> object:
    """A whole JSON file.

    Raises:
        DataError: It is no UTF-8, no JSON, or cannot be read; the message has the line.
    """
    try:
        parsed: object = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: no JSON: {error.msg}, column {error.colno}; mend the file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte at offset {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the path of a readable file") from error
    return parsed
