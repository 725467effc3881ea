"""Edits of YAML text by its nodes. What is not edited stays: comments, order, blank lines, quotes."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from engine.plan.yaml import mark

Edit = tuple[int, int, str]
"""Start and end in the text, and what stands there afterwards."""


@dataclass(frozen=True)
class Chunk:
    """The text of one entry of a mapping.

    Attributes:
        start: Where it begins; in a block the line of its first comment above, or of its key.
        end: Where it ends; in a block with its last line.
        key: Where its key begins.
        key_end: Where its key ends.
    """

    start: int
    end: int
    key: int
    key_end: int


def is_alias(key: yaml.Node, value: yaml.Node) -> bool:
    """Whether an entry's value is written elsewhere: what an alias stands for comes before it."""
    return bool(value.start_mark.index < key.start_mark.index)


def show(value: object) -> str:
    """A value as YAML between braces."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(entry)}" for name, entry in value.items()) + "}"
    return value if isinstance(value, str) and re.fullmatch(r"[a-z_]+", value) else json.dumps(value)


def apply(text: str, edits: Iterable[Edit]) -> str:
    """The text after edits that do not overlap."""
    result = text
    for start, end, new in sorted(edits, reverse=True):
        result = result[:start] + new + result[end:]
    return result


class Source:
    """YAML text in which entries of mappings are taken out, renamed or moved below another.

    Attributes:
        text: The text.
        marks: Where comments, aliases and ends of tokens are.
    """

    def __init__(self, text: str) -> None:
        """Marks ``text``, which has to be YAML."""
        self.text = text
        self.marks = mark(text)
        self._newline = "\r\n" if "\r\n" in text else "\n"

    def remove(self, node: yaml.MappingNode, places: Iterable[int]) -> Iterator[Edit]:
        """Takes entries out; their comments stay."""
        gone = sorted(places)
        for place in gone:
            if node.flow_style:
                yield from self._remove_flow(node, place, gone)
                continue
            chunk = self._chunk(node, place)
            indent = " " * node.value[place][0].start_mark.column
            kept = "".join(f"{indent}{one}{self._newline}" for one in self._comments(chunk))
            whole = len(gone) == len(node.value) and place == gone[-1]
            yield chunk.start, chunk.end, kept + (f"{indent}{{}}{self._newline}" if whole else "")

    def move(
        self,
        node: yaml.MappingNode,
        names: Mapping[int, str | None],
        section: str,
        new: Mapping[str, object],
    ) -> Iterator[Edit]:
        """Puts entries into a section of their own, which stands where the first of them stood.

        Args:
            node: The mapping that has them.
            names: By its place in the mapping, what an entry is called in the section, into which it moves as it is
                written; None for one of which only the comments move.
            section: Name of the section.
            new: Values of the section's other entries, which are written first.
        """
        places = sorted(names)
        indent = " " * node.value[places[0]][0].start_mark.column
        parts = [part for place in places for part in self._moved(node, place, names[place])]
        made = [f"{name}: {show(value)}" for name, value in new.items()]
        first, *others = (self._chunk(node, place) for place in places)
        if node.flow_style:
            yield first.start, first.end, f"{section}: {{{', '.join([*made, *parts])}}}"
            for place in places[1:]:
                yield from self._remove_flow(node, place, places[1:])
            return
        lines = [f"{indent}  {entry}{self._newline}" for entry in made]
        yield first.start, first.end, "".join([f"{indent}{section}:{self._newline}", *lines, *parts])
        yield from ((chunk.start, chunk.end, "") for chunk in others)

    def _moved(self, node: yaml.MappingNode, place: int, name: str | None) -> list[str]:
        """An entry under another name, or its comments; in a block two columns to the right."""
        chunk = self._chunk(node, place)
        if name is None:
            indent = " " * node.value[place][0].start_mark.column
            return [] if node.flow_style else [f"{indent}  {one}{self._newline}" for one in self._comments(chunk)]
        text = self.text[chunk.start : chunk.key] + name + self.text[chunk.key_end : chunk.end]
        if node.flow_style:
            return [text]
        text = text if text.endswith("\n") else text + self._newline
        return [f"  {line}" if line.strip() else line for line in _lines(text)]

    def _remove_flow(self, node: yaml.MappingNode, place: int, gone: Sequence[int]) -> Iterator[Edit]:
        """An entry between braces, with the comma behind it; the last without one, with that before."""
        chunk, last = self._chunk(node, place), len(node.value) - 1
        behind = node.end_mark.index if place == last else node.value[place + 1][0].start_mark.index
        comma = self._comma(chunk.end, behind)
        if comma is None:
            yield chunk.start, chunk.end, ""
            first = next(one for one in gone if all(later in gone for later in range(one, last + 1)))
            if first:
                start = self._chunk(node, first).start
                comma = self._comma(self._chunk(node, first - 1).end, start)
                assert comma is not None, "two entries without a comma"
                yield comma, start if self.text[comma + 1 : start].strip(" ") == "" else comma + 1, ""
            return
        if self.text[chunk.end : comma].strip():
            yield chunk.start, chunk.end, ""
            yield comma, comma + 1, ""
            return
        line, rest = self.text.rfind("\n", 0, chunk.start) + 1, self._line_end(comma)
        if self.text[line : chunk.start].strip() or self.text[comma + 1 : rest].strip():
            spaces = re.match(r"( *)(?![ #\r\n])", self.text[comma + 1 :])
            yield chunk.start, comma + 1 + (spaces.end() if spaces else 0), ""
        else:
            yield line, rest, ""

    def _comma(self, start: int, end: int) -> int | None:
        """The comma between two places that stands in no comment."""
        place = start
        while place < end:
            if self.text[place] == ",":
                return place
            place = self._line_end(place) if self.text[place] == "#" else place + 1
        return None

    def _comments(self, chunk: Chunk) -> list[str]:
        return [comment for start, comment in self.marks.comments if chunk.start <= start < chunk.end]

    def _chunk(self, node: yaml.MappingNode, place: int) -> Chunk:
        key, value = node.value[place]
        start, key_end, end = key.start_mark.index, key.end_mark.index, self._end(key, value)
        if node.flow_style:
            return Chunk(start, end, start, key_end)
        column = key.start_mark.column
        first = self.text.rfind("\n", 0, start) + 1
        while first and self._comment_column(above := self.text.rfind("\n", 0, first - 1) + 1) == column:
            first = above
        if self.text[end - 1] != "\n":
            end = self._line_end(end)
        while (deeper := self._comment_column(end)) is not None and deeper > column:
            end = self._line_end(end)
        return Chunk(first, end, start, key_end)

    def _end(self, key: yaml.Node, value: yaml.Node) -> int:
        """Behind the last character of a value. A block's own mark is where the next token begins."""
        if is_alias(key, value):
            return next(end for start, end in self.marks.aliases if start >= key.end_mark.index)
        return self.marks.ends[bisect_right(self.marks.ends, value.end_mark.index) - 1]

    def _line_end(self, place: int) -> int:
        found = self.text.find("\n", place)
        return len(self.text) if found < 0 else found + 1

    def _comment_column(self, start: int) -> int | None:
        """Where the comment of a line begins that holds nothing else; None for other lines."""
        line = self.text[start : self._line_end(start)]
        return len(line) - len(line.lstrip(" ")) if line.lstrip(" ").startswith("#") else None


def _lines(text: str) -> list[str]:
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]
