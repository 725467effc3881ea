"""A stricter YAML: a tree of plain values that remembers the line of each.

PyYAML reads ``1e-4`` as a string, ``no`` as False, ``010`` as 8 and ``1:30`` as 90, and silently keeps the last of two
equal keys. Here ``1e-4`` is a number; ``no``, ``010`` and ``1:30`` are strings (which strict typing then refuses where
something else is wanted); a second key, an infinity, a tag that does not fit its value, and control characters are
problems. Text is read in time and memory that its own length bounds, whatever its aliases, nesting and digits say.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Path of a value in a plan: ``("stages", 0, "optimizer", "lr")``."""


@dataclass(frozen=True)
class Problem:
    """One mistake, before its place in the file is known.

    Attributes:
        path: Path in the plan.
        got: The value there.
        allowed: The allowed values.
        change: How to correct it, a clause such as ``change it to 3`` or ``did you mean 'lr'?``.
    """

    path: Path
    got: str
    allowed: str
    change: str

    @property
    def text(self) -> str:
        """The message without its place."""
        return f"{show_path(self.path)}: got {self.got}; allowed {self.allowed}; {self.change}"


@dataclass
class Document:
    """A parsed YAML file.

    Attributes:
        tree: Mappings, lists and scalars.
        places: ``file:line`` of every value, by its path; a mapping's entry has the line of its key.
        problems: Mistakes of the YAML itself.
        node: The root of the composed nodes, with their positions in the text; None for an empty text.
    """

    tree: Any
    places: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    node: yaml.Node | None = None

    def place(self, path: Path) -> str:
        """Place of ``path``, or of the nearest container that has one."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


def show_path(path: Path) -> str:
    """``("stages", 0, "lr")`` as ``stages.0.lr``, which is also how an override is written."""
    return ".".join(str(part) for part in path) or "plan"


def shortened(text: str) -> str:
    """At most 60 characters of a text."""
    return text if len(text) <= 60 else text[:57] + "..."


def show_value(value: object) -> str:
    """A value as its author wrote it in YAML, shortened; containers by their kind."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return repr(shortened(value))
        case Mapping():
            return "a mapping" if value else "an empty mapping"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
        case _:
            return str(value)


MAX_CHARACTERS = 1 << 20
"""Length of the longest YAML text that is read."""

_MAX_DEPTH = 64
_MAX_VALUES = 200_000
_MAX_DIGITS = 30


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers below; used to compose nodes only, which it does for so many levels."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's, which calls itself for each level."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            problem = f"nested more than {_MAX_DEPTH} levels deep"
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings that the loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_COMMENT = re.compile(r"#[^\n]*")
_CONTAINERS: Mapping[type[yaml.Node], str] = {
    yaml.MappingNode: "tag:yaml.org,2002:map",
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
}
_INTEGER = r"[-+]?(0|[1-9][0-9_]*)"
_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(([0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.?)([eE][-+]?[0-9]+)|[-+]?([0-9][0-9_]*)?\.[0-9]+|[-+]?[0-9][0-9_]*\."
        r"|[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)",
        "-+.0123456789inN",
    ),
)

_WRITTEN = {tag: re.compile(pattern) for tag, pattern, _ in _RESOLVERS}
"""How the values of each tag are written, also where the tag is written out."""

_CONTROL = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\U0010ffff]")

# The dumper keeps YAML 1.1's resolvers beside ours, so that other readers read its output in the same way.
_Loader.yaml_implicit_resolvers = {}
for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def read_yaml(text: str, place: str = "<plan>", *, numbered: bool = True) -> Document:
    """Parses YAML text.

    Args:
        text: One YAML document.
        place: File name for messages.
        numbered: Whether places end in a line number; not for overrides, which are one line.

    Returns:
        The document with its ``problems``. Text that is no YAML at all gives a tree of None and one problem.
    """

    def where(line: int) -> str:
        return f"{place}:{line + 1}" if numbered else place

    if len(text) > MAX_CHARACTERS:
        document = Document(None, {(): where(0)})
        allowed = f"at most {MAX_CHARACTERS:,}"
        document.problems.append(Problem((), f"text of {len(text):,} characters", allowed, "name another file"))
        return document
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document = Document(None, {(): where(mark.line if mark is not None else 0)})
        got = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(
            Problem((), f"text that is no YAML ({got})", "YAML", "change this line or the one above")
        )
        return document
    except yaml.reader.ReaderError as error:
        document = Document(None, {(): where(text.count("\n", 0, error.position))})
        change = "save the file as UTF-8 text"
        document.problems.append(Problem((), "a character that YAML does not allow", "printable Unicode", change))
        return document
    except (ValueError, OverflowError) as error:  # PyYAML's own, at "\UFFFFFFFF" and %YAML with very many digits
        document = Document(None, {(): where(0)})
        document.problems.append(Problem((), f"text that is no YAML ({error})", "YAML", "write plain text"))
        return document
    reader = _Reader(where)
    document = reader.document
    document.places[()] = where(0)
    document.node = node
    document.tree = None if node is None else reader.read(node, ())
    return document


@dataclass(frozen=True)
class Marks:
    """Where in YAML text something stands that is no value.

    Attributes:
        comments: Where each comment begins, and its text.
        aliases: Where each alias begins and ends.
        ends: Behind the last character of each token, in their order.
    """

    comments: tuple[tuple[int, str], ...]
    aliases: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]


def mark(text: str) -> Marks:
    """Marks of text that ``read_yaml`` can read. A comment stands between two tokens."""
    comments: list[tuple[int, str]] = []
    aliases: list[tuple[int, int]] = []
    ends, seen = [0], 0
    for token in yaml.scan(text, Loader=_Loader):
        start, end = token.start_mark.index, token.end_mark.index
        comments += [(one.start(), one.group().rstrip()) for one in _COMMENT.finditer(text, seen, max(seen, start))]
        seen = max(seen, end)
        if isinstance(token, yaml.AliasToken):
            aliases.append((start, end))
        if end > max(start, ends[-1]):
            ends.append(end)
    return Marks(tuple(comments), tuple(aliases), tuple(ends))


def write_yaml(tree: object) -> str:
    """YAML text that ``read_yaml`` reads back to an equal tree."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Reader:
    """Turns composed nodes into values, noting places and problems."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self.document = Document(None)
        self._where = where
        self._open: list[yaml.Node] = []
        self._values = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node; a wrong one is recorded as a problem and replaced by None."""
        self.document.places.setdefault(path, self._where(node.start_mark.line))
        self._values += 1
        if self._values > _MAX_VALUES:
            return self._refuse(
                (), "aliases that stand for more values than fit", f"{_MAX_VALUES:,} values", "use fewer"
            )
        if any(node is parent for parent in self._open):
            return self._refuse(path, "an alias of what it stands in", "a tree", "write the value out")
        if not isinstance(node, yaml.ScalarNode) and node.tag != _CONTAINERS[type(node)]:
            return self._refuse(path, f"the tag {node.tag}", "plain YAML without tags", "remove the tag")
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return dict(self._entries(node, path))
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, index)) for index, item in enumerate(self._within(node.value))]
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _within(self, members: list[Any]) -> Iterator[Any]:
        """The members until the document holds too many values."""
        for member in members:
            if self._values > _MAX_VALUES:
                return
            yield member

    def _entries(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, Any]]:
        lines: dict[str, int] = {}
        for key_node, value_node in self._within(node.value):
            line = key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(path, "a key that is itself a collection", "plain words as keys", "change the key")
                continue
            key = str(key_node.value)
            if not key.isprintable():
                self._refuse(path, f"the key {shortened(key)!r}", "printable words as keys", "change the key")
                continue
            if key in lines:
                got = f"a second {key!r} (the first is in line {lines[key] + 1})"
                self.document.places[(*path, key)] = self._where(line)
                self._refuse((*path, key), got, "each key once", "remove one of the two")
                continue
            lines[key] = line
            self.document.places[(*path, key)] = self._where(line)
            yield key, self.read(value_node, (*path, key))

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        name, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        if name == "str":
            if _CONTROL.search(text) is None:
                return text
            got = f"{show_value(text)} with a control character"
            return self._refuse(path, got, "printable text", "leave the character out")
        written = _WRITTEN.get(node.tag)
        if written is None:
            return self._refuse(path, f"the tag {node.tag}", "plain YAML without tags", "remove the tag")
        if written.fullmatch(text) is None and not (name == "float" and re.fullmatch(_INTEGER, text)):
            return self._refuse(path, f"{show_value(text)} with the tag !!{name}", "a value of it", "remove the tag")
        match name:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                digits = text.replace("_", "")
                if len(digits.lstrip("+-")) <= _MAX_DIGITS:
                    return int(digits)
                got = f"an integer of {len(digits.lstrip('+-')):,} digits"
                return self._refuse(path, got, f"at most {_MAX_DIGITS} digits", "change the number")
            case _:
                number = float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
                if math.isfinite(number):
                    return number
                return self._refuse(path, shortened(text), "a finite number", "change it to a finite number")

    def _refuse(self, path: Path, got: str, allowed: str, change: str) -> None:
        self.document.problems.append(Problem(path, got, allowed, change))
