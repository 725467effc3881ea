"""A CSV, TSV, JSON, JSON-lines or Parquet list: one row per picture or clip, per caption, or per question."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from omnivl.data.convert.boxes import BoxForm
from omnivl.data.convert.entry import Entry, texts_of
from omnivl.data.convert.lists import Row, count_rows, read_list
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError


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
        separator: Between the columns of a text table; None for that of the list's suffix.
        quotes: Whether quotes enclose values of a text table; None for as the list's suffix has it.
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
    separator: str | None = None
    quotes: bool | None = None

    @property
    def form(self) -> str:
        """Name of the form."""
        return "table"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The list."""
        return (self.table,)

    def count(self) -> int:
        """Rows of the list, about."""
        return count_rows(self.table)

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
        return read_list(self.table, self._columns(), separator=self.separator, quotes=self.quotes)

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
