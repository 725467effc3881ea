"""Braces of a source's pattern: ``{000..127}``, ``{0..90..10}``, ``{a,b}``, also within each other, as in shells.

Source: GNU Bash manual, "Brace Expansion".
Differs: there are no ranges of letters or of negative numbers. What is neither a range nor a list stays as it is.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, product

from omnivl.errors import DataError

MAX_SHARDS = 1_000_000

_MAX_CHARACTERS = 1 << 28  # of all names together
_MAX_DEPTH = 32
_MARKS = re.compile(r"[{},]")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})(?:\.\.(-?[0-9]{1,9}))?")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, those of the leftmost braces changing slowest.

    Time and memory are bounded, whatever the pattern says.

    Raises:
        DataError: There are more than ``MAX_SHARDS``, or braces lie too deep within each other.
    """
    open_braces, place = [_Brace(pattern)], 0
    for mark in _MARKS.finditer(pattern):
        inner = open_braces[-1]
        inner.add_text(pattern[place : mark.start()])
        place = mark.end()
        if mark.group() == "{":
            if len(open_braces) > _MAX_DEPTH:
                raise DataError(f"data source {pattern!r}: braces within more than {_MAX_DEPTH} others; write fewer")
            open_braces.append(_Brace(pattern))
        elif len(open_braces) == 1:
            inner.add_text(mark.group())
        elif mark.group() == ",":
            inner.begin_next()
        else:
            open_braces.pop()
            inner.close(open_braces[-1])
    open_braces[-1].add_text(pattern[place:])
    while len(open_braces) > 1:  # a brace that is never closed is a part of the name
        inner = open_braces.pop()
        inner.close(open_braces[-1], is_closed=False)
    return open_braces[0].names()


@dataclass
class _Brace:
    """What stands between a brace and its end; for the outermost one, the whole pattern.

    Attributes:
        pattern: For messages.
        finished: The names of each choice before the last comma.
        parts: Texts and choices since then, one after the other.
        text: Pieces of the text behind them.
    """

    pattern: str
    finished: list[list[str]] = field(default_factory=list)
    parts: list[list[str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        """Goes on with a text."""
        self.text.append(text)

    def add_choices(self, choices: list[str]) -> None:
        """Goes on with one of several texts."""
        self._end_text()
        self.parts.append(choices)

    def names(self) -> list[str]:
        """What was added since the last comma stands for."""
        self._end_text()
        count = math.prod(map(len, self.parts))
        self._check(count)
        self._check(count, sum(count // len(part) * sum(map(len, part)) for part in self.parts))
        return ["".join(name) for name in product(*self.parts)]

    def _end_text(self) -> None:
        if text := "".join(self.text):
            self.parts.append([text])
        self.text = []

    def begin_next(self) -> None:
        """Goes on with the next choice, behind a comma."""
        self.finished.append(self.names())
        self.parts = []

    def close(self, outer: "_Brace", *, is_closed: bool = True) -> None:
        """Adds what was found to the text around it, as choices or, where it is neither a range nor a list, as text."""
        if is_closed and self.finished:
            self.begin_next()
            self._check(sum(map(len, self.finished)))
            outer.add_choices(list(chain.from_iterable(self.finished)))
            return
        only = "".join(self.text) if is_closed and not self.parts else ""
        if (numbers := self._range(only)) is not None:
            outer.add_choices(numbers)
            return
        outer.add_text("{")
        for choices in self.finished:
            outer.add_choices(choices)
            outer.add_text(",")
        for part in self.parts:
            outer.add_choices(part)
        outer.add_text("".join([*self.text, "}" if is_closed else ""]))

    def _range(self, body: str) -> list[str] | None:
        """The numbers of a range, all equally wide where one of its ends has a zero in front; None where it is none."""
        match = _RANGE.fullmatch(body)
        if match is None:
            return None
        ends = match.group(1), match.group(2)
        first, last = map(int, ends)
        step = max(1, abs(int(match.group(3) or 1)))
        numbers: Sequence[int] = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        self._check(abs(last - first) // step + 1)
        width = max(map(len, ends)) if any(end != str(int(end)) for end in ends) else 0
        return [str(number).zfill(width) for number in numbers]

    def _check(self, names: int, characters: int = 0) -> None:
        if names > MAX_SHARDS or characters > _MAX_CHARACTERS:
            raise DataError(too_many_shards(self.pattern))


def too_many_shards(pattern: str) -> str:
    """What is said about a pattern that stands for more than ``MAX_SHARDS`` files."""
    return f"data source {pattern!r}: more than {MAX_SHARDS:,} shards; name fewer, or make larger ones"
