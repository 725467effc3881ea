"""Objects of annotation files: each knows where it stands, and its fields are taken out by name and type."""

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from omnivl.data.sources.base import BadSampleError, Cause
from omnivl.errors import DataError

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60
_SHOWN.maxlevel = 3


def shown(value: object) -> str:
    """The beginning of a value of a file, however large or deep it is."""
    return _SHOWN.repr(value)


@dataclass(frozen=True)
class Record:
    """An object of an annotation file. Every method raises a ``BadSampleError`` that names the place and the field.

    Attributes:
        file: Where it stands.
        place: Where in the file: ``:LINE``, ``[NUMBER]``, ``:images[NUMBER].sentences[NUMBER]``.
        fields: Its fields.
    """

    file: Path
    place: str
    fields: Mapping[str, object]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}{self.place}"

    def only(self, names: Collection[str], title: str) -> None:
        """Refuses other fields than these, in a form whose meaning was never compared with a real file.

        Raises:
            DataError: There are others.
        """
        if surplus := sorted(str(name) for name in self.fields if name not in names):
            raise DataError(
                f"{self.where}: {title} is not known to have {', '.join(map(repr, surplus))}; "
                f"allowed: {', '.join(names)}; look what they mean, and take them out of the file if nothing is lost"
            )

    def get(self, name: str) -> object:
        """A field as it stands; None if it is not there."""
        return self.fields.get(name)

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.fields.get(name) is not None

    def refuse(self, cause: Cause, detail: str) -> NoReturn:
        """Leaves this object out.

        Raises:
            BadSampleError: Always.
        """
        raise BadSampleError(cause, self.where, detail)

    def wrong(self, name: str, allowed: str, cause: Cause = "wrong_field") -> NoReturn:
        """Leaves this object out because of a field: ``missing_field`` where it is not there, else ``cause``."""
        if name not in self.fields:
            self.refuse("missing_field", f"no {name!r}; allowed: {allowed}")
        self.refuse(cause, f"{name} is {shown(self.fields[name])}; allowed: {allowed}")

    def text(self, name: str, cause: Cause = "wrong_field") -> str:
        """A text that is not empty, stripped."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            self.wrong(name, "a text", cause)
        return value.strip()

    def whole(self, name: str, below: int | None = None) -> int:
        """A whole number, where ``below`` is given one from 0 to below it."""
        value = self.fields.get(name)
        if not _is_whole(value) or (below is not None and not 0 <= value < below):
            self.wrong(name, "a whole number" if below is None else f"a whole number from 0 to {below - 1}")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A number; a text of a CSV file is read as one."""
        value = self.fields.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high:
            self.wrong(name, "a number" if low == -math.inf else f"a number from {low:g} to {high:g}")
        return number

    def identifier(self, name: str) -> str | int:
        """A whole number or a text that is not empty."""
        value = self.fields.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if not _is_whole(value):
            self.wrong(name, "a whole number or a text")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.fields.get(name)
        if not isinstance(value, bool):
            self.wrong(name, "true or false")
        return value

    def one_of(self, name: str, allowed: Collection[str], cause: Cause = "wrong_field") -> str:
        """One of some words."""
        value = self.fields.get(name)
        if not isinstance(value, str) or value not in allowed:
            self.wrong(name, ", ".join(allowed), cause)
        return value

    def values(self, name: str, count: int | None = None) -> list[object]:
        """A list, where ``count`` is given of so many."""
        value = self.fields.get(name)
        if not isinstance(value, list) or (count is not None and len(value) != count):
            self.wrong(name, "a list" if count is None else f"a list of {count}")
        return value

    def numbers(self, name: str, count: int | None = None) -> list[float]:
        """A list of numbers."""
        values = self.values(name, count)
        return [
            Record(self.file, self.place, {f"{name}[{at}]": one}).number(f"{name}[{at}]")
            for at, one in enumerate(values)
        ]

    def texts(self, name: str, count: int | None = None, cause: Cause = "wrong_field") -> list[str]:
        """A list of texts that are not empty, stripped."""
        return self.each(name, lambda value: value.strip() if isinstance(value, str) else None, "a text", count, cause)

    def each(
        self,
        name: str,
        take: Callable[[object], str | None],
        allowed: str,
        count: int | None = None,
        cause: Cause = "wrong_field",
    ) -> list[str]:
        """A list, each of whose values ``take`` makes a text of that is not empty."""
        taken = []
        for place, value in enumerate(self.values(name, count)):
            text = take(value)
            if not text:
                self.refuse(cause, f"{name}[{place}] is {shown(value)}; allowed: {allowed}")
            taken.append(text)
        return taken


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
