"""Rows of lists: CSV, TSV, JSON, JSON lines and Parquet, each with the place where it stands."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pyarrow
from pyarrow.parquet import ParquetFile

from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError, did_you_mean

LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

Row = tuple[str, Mapping[str, object]]
"""``FILE:LINE`` or ``FILE[NUMBER]``, and the values by column."""

_SEPARATORS = (";", "\t", "|", ",")
_LARGEST_VALUE = 1 << 24  # characters
_BATCH_ROWS = 1024
_FIRST_BYTES = 1 << 16


def read_list(
    file: Path, columns: Sequence[str], *, separator: str | None = None, quotes: bool | None = None
) -> Iterator[Row | Rejection]:
    """Rows of a list whose suffix says what it is. A ``.json`` list is held in memory, the others are read in parts.

    Args:
        file: The list.
        columns: Columns that a CSV, TSV or Parquet table must have.
        separator: Between columns of a CSV or TSV table; by default a comma, in ``.tsv`` a tab.
        quotes: Whether quotes in a CSV or TSV table enclose a value; by default they do, in ``.tsv`` they are letters.

    Raises:
        DataError: The form is unknown, the file is no such list, or a column is missing or stands twice.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        tabs = suffix == ".tsv"
        return read_csv(
            file,
            columns,
            separator=separator if separator is not None else "\t" if tabs else ",",
            quotes=not tabs if quotes is None else quotes,
        )
    if separator is not None or quotes is not None:
        raise DataError(f"{file}: only .csv and .tsv lists have separators and quotes; leave these options out")
    match suffix:
        case ".jsonl" | ".ndjson":
            return read_json_lines(file)
        case ".json":
            return _json_list(file)
        case ".parquet":
            return _parquet(file, columns)
        case other:
            raise DataError(f"{file}: lists of the form {other!r} are not read; allowed: {', '.join(LIST_SUFFIXES)}")


def count_rows(file: Path) -> int:
    """Rows of a list, about: lines of one that is read line by line."""
    match file.suffix.lower():
        case ".json":
            return sum(1 for _ in _json_list(file))
        case ".parquet":
            with _opened_parquet(file) as table:  # the rows are read later, from a file opened anew
                return int(table.metadata.num_rows)
        case _:
            with file.open("rb") as lines:
                return sum(1 for _ in lines)


def check_columns(file: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuses a table in which a column is missing or stands twice.

    Raises:
        DataError: With the columns that exist and the nearest name.
    """
    for column in wanted:
        if column not in found:
            change = did_you_mean(column, found, "name the right one")
            raise DataError(f"{file}:1: no column {column!r}; the columns are {', '.join(map(repr, found))}; {change}")
        if found.count(column) > 1:
            raise DataError(
                f"{file}:1: {found.count(column)} columns are named {column!r}; give each a name of its own"
            )


def read_csv(
    file: Path, columns: Sequence[str], *, separator: str = ",", quotes: bool = True
) -> Iterator[Row | Rejection]:
    """Rows of a table with a header line, each with ``FILE:LINE``.

    A row stands on one line. Quotes that enclose line ends are mostly stray ones, which swallow the rows between them:
    each line that they hold is rejected.

    Args:
        file: The table.
        columns: Columns that it must have.
        separator: One letter between columns.
        quotes: Whether quotes enclose values; otherwise they are letters.

    Raises:
        DataError: A column is missing or stands twice, or the file has no header.
    """
    csv.field_size_limit(_LARGEST_VALUE)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline=_line_end(file)) as lines:
        reader = csv.DictReader(lines, delimiter=separator, strict=True, quoting=quoting)
        try:
            header = reader.fieldnames
        except csv.Error as error:
            raise DataError(f"{file}:1: {error}; write a header line with the names of the columns") from error
        if header is None:
            raise DataError(f"{file}: the file is empty; write a header line with the names of the columns")
        if any("\udc80" <= letter <= "\udcff" for name in header for letter in name):
            raise DataError(f"{file}:1: the header line is not UTF-8; save the file as UTF-8")
        other = next((one for one in _SEPARATORS if len(header) == 1 and one in header[0]), None)
        if other is not None and header[0] not in columns:
            named = "tab" if other == "\t" else repr(other)
            raise DataError(f"{file}:1: one column, {header[0]!r}; if {named} parts columns, say --separator {named}")
        check_columns(file, header, columns)
        while True:
            before = reader.reader.line_num  # of DictReader itself it is out of date after an error
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = reader.reader.line_num
                yield from _not_on_one_line(file, min(before + 1, last), last, f"no CSV row: {error}; mend its quotes")
                continue
            where = f"{file}:{reader.line_num}"
            values = [value for value in row.values() if isinstance(value, str)]
            line_ends = sum(max(value.count("\n"), value.count("\r")) for value in values)
            if None in row:
                extra = len(row[None]) + len(header)  # surplus values are under the key None
                detail = f"{extra} fields for {len(header)} columns; put texts that have a {separator!r} in quotes"
                yield Rejection("wrong_json", where, detail)
            elif line_ends:
                first = reader.line_num - line_ends
                detail = f"quotes from line {first} to {reader.line_num} enclose line ends"
                change = "a row stands on one line: mend the quotes, or read them as letters (--no-quotes)"
                yield from _not_on_one_line(file, first, reader.line_num, f"{detail}; {change}")
            elif any("\udc80" <= letter <= "\udcff" for value in values for letter in value):
                yield Rejection("invalid_utf8", where, "the row is not UTF-8; save the file as UTF-8")
            else:
                yield where, row


def _not_on_one_line(file: Path, first: int, last: int, detail: str) -> Iterator[Rejection]:
    return (Rejection("wrong_json", f"{file}:{line}", detail) for line in range(first, last + 1))


def _line_end(file: Path) -> str:
    """What ends a line: a carriage return within a text does not, unless the file has no other line ends."""
    with file.open("rb") as opened:
        first = opened.read(_FIRST_BYTES)
    return "\r" if b"\r" in first and b"\n" not in first else "\n"


def read_json_lines(file: Path) -> Iterator[Row | Rejection]:
    """Objects of a file that has one on each line, each with ``FILE:LINE``."""
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
    text = load_text(file)
    try:
        parsed: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: no JSON: {error.msg}, column {error.colno}; mend the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no JSON that can be read: {error}; mend the file") from error
    return parsed


def load_text(file: Path) -> str:
    """A whole text file.

    Raises:
        DataError: It is no UTF-8 or cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte at offset {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the path of a readable file") from error


def _opened_parquet(file: Path) -> ParquetFile:
    try:
        return ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: no Parquet file: {error}; mend the file") from error


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[Row | Rejection]:
    table = _opened_parquet(file)
    check_columns(file, table.schema_arrow.names, columns)
    number = 0
    try:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
            for row in batch.to_pylist():
                where, number = f"{file}[{number}]", number + 1
                try:
                    yield where, {name: _plain(value) for name, value in row.items()}
                except TypeError as error:
                    yield Rejection("wrong_json", where, f"{error}; leave that column out")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: damaged behind row {number}: {error}; mend the file") from error


def _plain(value: object) -> object:
    """A value of a Parquet column as JSON has it; dates and decimals as texts, NaN as a missing value.

    Raises:
        TypeError: It holds bytes.
    """
    match value:
        case bytes():
            raise TypeError("a column holds bytes, which are no text")
        case float() if not math.isfinite(value):
            return None
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(one) for one in value]
        case dict():
            return {str(name): _plain(one) for name, one in value.items()}
        case _:
            return str(value)
