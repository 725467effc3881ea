"""Metadata fields of a shard's samples as columns, to filter by.

A column has an entry only for the samples that have the field: the memory of all columns is bounded by the text that
they were read from, also where each sample has fields of its own.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_VALUES = 4096  # of a field with more different values in a shard only numbers are kept


@dataclass(frozen=True)
class FieldColumn:
    """One field. K samples have it.

    Attributes:
        rows: int32 ``[K]``: the samples, rising.
        values: The different values as JSON; None if there are too many.
        codes: int32 ``[K]``: index in ``values``; empty without them.
        numbers: float64 ``[K]``: the values, where there are too many and all are numbers; else empty.
    """

    rows: NDArray[np.int32]
    values: tuple[str, ...] | None
    codes: NDArray[np.int32]
    numbers: NDArray[np.float64]


class FieldColumns(Mapping[str, tuple[tuple[str, ...], NDArray[np.int32]]]):
    """The fields of N samples. As a mapping: distinct values (as JSON) and int32 ``[N]`` codes into them, -1 for none.

    Fields with too many values are not in the mapping, but in ``columns``.
    """

    def __init__(self, columns: Mapping[str, FieldColumn], length: int) -> None:
        """Holds the columns of ``length`` samples."""
        self.columns = dict(columns)
        self._length = length

    def __getitem__(self, name: str) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        column = self.columns[name]
        if column.values is None:
            raise KeyError(name)
        codes = np.full(self._length, -1, dtype=np.int32)
        codes[column.rows] = column.codes
        return column.values, codes

    def __iter__(self) -> Iterator[str]:
        return (name for name, column in self.columns.items() if column.values is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A field's numbers, float64 ``[N]``; NaN where a sample has none.

        Raises:
            KeyError: No sample has the field, or it has too many values that are no numbers.
        """
        column = self.columns[name]
        found = np.full(self._length, np.nan)
        if column.values is not None:
            parsed = (as_number(json.loads(value)) for value in column.values)
            table = np.array([np.nan if value is None else value for value in parsed])
            found[column.rows] = table[column.codes]
        elif len(column.numbers):
            found[column.rows] = column.numbers
        else:
            raise KeyError(name)
        return found

    def only(self, keep: NDArray[np.bool_]) -> "FieldColumns":
        """The fields of the samples where ``keep``, bool ``[N]``, is true."""
        place = (np.cumsum(keep) - 1).astype(np.int32)
        columns = {}
        for name, column in self.columns.items():
            kept = keep[column.rows]
            codes = column.codes[kept] if len(column.codes) else column.codes
            numbers = column.numbers[kept] if len(column.numbers) else column.numbers
            columns[name] = FieldColumn(place[column.rows[kept]], column.values, codes, numbers)
        return FieldColumns(columns, int(keep.sum()))


def as_number(value: object) -> float | None:
    """A JSON number; None for anything else, true and false included."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


class _Growing:
    """A column that grows."""

    def __init__(self) -> None:
        self.rows = array("i")
        self.codes = array("i")
        self.numbers = array("d")
        self.values: dict[str, int] | None = {}
        self.all_numbers = True

    def add(self, row: int, value: object) -> None:
        number = as_number(value)
        self.all_numbers = self.all_numbers and number is not None
        if self.values is None and not self.all_numbers:
            del self.rows[:], self.numbers[:]
            return
        self.rows.append(row)
        if self.all_numbers and number is not None:
            self.numbers.append(number)
        if self.values is not None:
            text = json.dumps(value, ensure_ascii=False, sort_keys=True)
            self.codes.append(self.values.setdefault(text, len(self.values)))
            if len(self.values) > MAX_VALUES:
                self.values = None
                del self.codes[:]
                if not self.all_numbers:
                    del self.rows[:], self.numbers[:]

    def done(self) -> FieldColumn:
        wide = self.values is None
        return FieldColumn(
            rows=np.array(self.rows, dtype=np.int32),
            values=None if self.values is None else tuple(self.values),
            codes=np.array(self.codes, dtype=np.int32),
            numbers=np.array(self.numbers if wide and self.all_numbers else (), dtype=np.float64),
        )


class FieldEncoder:
    """Encodes fields sample by sample."""

    def __init__(self) -> None:
        """Starts without fields."""
        self._columns: dict[str, _Growing] = {}

    def add(self, row: int, fields: Mapping[str, object]) -> None:
        """Appends the fields of a sample; rows rise."""
        for name, value in fields.items():
            if name not in self._columns:
                self._columns[name] = _Growing()
            self._columns[name].add(row, value)

    def columns(self, length: int) -> FieldColumns:
        """The fields of ``length`` samples, sorted by name."""
        return FieldColumns({name: self._columns[name].done() for name in sorted(self._columns)}, length)
