"""Plans and model files of earlier spelling rewritten into today's; comments, order and blank lines stay.

What is rewritten are the fields that ``omnivl.architectures.upgrades`` and ``moe.upgrades`` know. A rewritten plan is
read again and has to equal the one of before.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import yaml

from engine.errors import PlanError
from engine.plan.edits import Edit, Source, apply, is_alias, show
from engine.plan.model import DEFAULT_KIND, architectures, merged
from engine.plan.parse import parse_plan
from engine.plan.schema import field_types
from engine.plan.yaml import Document, Path, Problem, mark, read_yaml, show_path
from moe.upgrades import MOVED
from moe.upgrades import upgraded as upgraded_ffn
from omnivl.architectures.upgrades import MEANINGLESS, successor, upgraded
from omnivl.architectures.upgrades import MOVED as MOVED_IN_MODELS


@dataclass(frozen=True)
class Change:
    """One field of earlier spelling.

    Attributes:
        path: Where it stands.
        said: What became of it.
        edits: What rewrites it; of fields that move together the first one has them.
        problem: Why it cannot be rewritten, None where it can.
    """

    path: Path
    said: str
    edits: tuple[Edit, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class Rewritten:
    """A file in today's spelling.

    Attributes:
        text: The YAML.
        earlier: A line for each field of earlier spelling that it had: ``file:line: path``, and what it is today.
        others: Files with earlier fields that it names: the model file of a plan.
    """

    text: str
    earlier: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def earlier_fields(text: str, place: str) -> dict[str, tuple[str, ...]]:
    """Fields of earlier spelling of a plan without mistakes, and of the model file that it names.

    Args:
        text: The plan.
        place: Its file name.

    Returns:
        Lines as in ``Rewritten``, by file; files without earlier fields are left out.
    """
    document = read_yaml(text, place)
    found = {place: told(document, _plan_changes(document, Source(text)))}
    file = _model_file(document.tree)
    if file is not None:
        below = read_yaml(file.read_text(encoding="utf-8"), str(file))
        found[str(file)] = told(below, _file_changes(below, Source(file.read_text(encoding="utf-8"))))
    return {name: lines for name, lines in found.items() if lines}


def rewrite_plan(text: str, place: str) -> Rewritten:
    """Brings a plan's earlier fields into today's form.

    Args:
        text: The plan.
        place: Its file name, for messages.

    Raises:
        PlanError: The plan has mistakes, or fields that cannot be rewritten without changing what it means.
    """
    before = parse_plan(text, place)
    document = read_yaml(text, place)
    done = rewritten(
        document, text, _plan_changes(document, Source(text)), lambda result: parse_plan(result, place) == before
    )
    return replace(done, others=tuple(file for file in earlier_fields(text, place) if file != place))


def rewrite_model_file(text: str, place: str) -> Rewritten:
    """The same for a file that holds the fields of a model, as ``model.preset`` of a plan may name it.

    Raises:
        PlanError: The text is no YAML, or as in ``rewrite_plan``.
    """
    document = read_yaml(text, place)
    if document.problems:
        raise PlanError([f"{document.place(problem.path)}: {problem.text}" for problem in document.problems])
    changes = _file_changes(document, Source(text))
    return rewritten(document, text, changes, lambda result: _todays(read_yaml(result).tree) == _todays(document.tree))


def is_model_file(tree: object) -> bool:
    """Whether a file's content can be the fields of a model, of today or of before."""
    known = {name for cls in architectures().values() for name in field_types(cls)} | {"preset", "architecture"}
    known |= {name for fields in (*MOVED_IN_MODELS.values(), *MEANINGLESS.values()) for name in fields}
    return isinstance(tree, Mapping) and bool(tree) and all(name in known for name in tree)


def kind_of(model: Mapping[str, Any]) -> str:
    """The architecture's kind of a model section's fields, of today or of before."""
    return str(upgraded(model, DEFAULT_KIND).get("kind", DEFAULT_KIND))


def told(document: Document, changes: Sequence[Change]) -> tuple[str, ...]:
    """The changes as lines, in the order of the file."""
    places = [document.place(change.path) for change in changes]
    lines = zip(places, changes, strict=True)
    ordered = sorted(lines, key=lambda line: int(line[0].rpartition(":")[2]))
    return tuple(f"{place}: {show_path(change.path)} {change.said}" for place, change in ordered)


def rewritten(document: Document, text: str, changes: Sequence[Change], same: Callable[[str], bool]) -> Rewritten:
    """Makes the changes and looks at what came of them.

    Args:
        document: The file, as it was read.
        text: Its text.
        changes: Its earlier fields.
        same: Whether a text means the same as the file.

    Raises:
        PlanError: A field cannot be rewritten, a comment would be lost, or the file would mean something else.
    """
    problems = [change.problem for change in changes if change.problem is not None]
    if problems:
        raise PlanError([f"{document.place(problem.path)}: {problem.text}" for problem in problems])
    # A section that is written once and stands in several places, by an alias, has the same edits in each of them.
    edits = sorted({edit for change in changes for edit in change.edits})
    lines = told(document, changes)
    by_hand = f"; change by hand: {'; '.join(lines)}"
    if any(start < end for (_, end, _), (start, _, _) in itertools.pairwise(edits)):
        got = "an alias of a section of earlier spelling that means another thing in each place"
        raise PlanError([f"{document.place(())}: got {got}{by_hand}"])
    result = apply(text, edits)
    try:
        is_same = same(result)
    except PlanError as error:
        wrong = "; ".join(error.problems)
        got = f"fields of earlier spelling that cannot be rewritten by themselves ({wrong})"
        raise PlanError([f"{document.place(())}: got {got}{by_hand}"]) from error
    if not is_same:
        got = "fields of earlier spelling whose rewriting would change what the file means"
        raise PlanError([f"{document.place(())}: got {got}{by_hand}"])
    before, after = (Counter(comment for _, comment in mark(one).comments) for one in (text, result))
    if before != after:
        lost = ", ".join(repr(comment) for comment in before - after)
        got = f"comments inside of what has to be written anew ({lost})"
        raise PlanError([f"{document.place(())}: got {got}{by_hand}"])
    return Rewritten(result, lines)


def model_changes(
    source: Source, path: Path, node: yaml.Node | None, given: Any, kind: str, over: Any
) -> Iterator[Change]:
    """Earlier fields of a model section, or of the part of one that a stage has.

    Args:
        source: The text.
        path: Where the section stands.
        node: Its node.
        given: Its fields.
        kind: The architecture's, where the section names none.
        over: The filling that the section's own is laid over, None where there is none.
    """
    if not isinstance(node, yaml.MappingNode) or not isinstance(given, Mapping):
        return
    fields = {name: value for name, value in given.items() if name != "preset"}
    new = upgraded(fields, kind)
    kind = str(new.get("kind", kind))
    gone: dict[int, str] = {}
    for place, (key, value) in enumerate(node.value):
        name, at = successor(key.value, kind), (*path, key.value)
        if key.value == "preset" or (name == key.value and name in new):
            continue
        if name not in new:
            gone[place] = f"means nothing to the architecture {kind!r}"
        elif name in fields:
            gone[place] = f"stands beside {name}, which is its name today"
        else:
            edits = [(key.start_mark.index, key.end_mark.index, name)]
            if new[name] != given[key.value]:
                edits.append((value.start_mark.index, value.end_mark.index, show(new[name])))
            change = Change(at, _is_called((*path, name), new[name], given[key.value]), tuple(edits))
            yield _by_hand(change, "an alias", "write its value out") if is_alias(key, value) else change
    edits = list(source.remove(node, gone))
    for place, said in gone.items():
        yield Change((*path, node.value[place][0].value), said, tuple(edits))
        edits = []
    for key, value in node.value:
        if key.value == "ffn":
            yield from filling_changes(source, (*path, "ffn"), value, fields["ffn"], over)


def filling_changes(source: Source, path: Path, node: yaml.Node, given: Any, over: Any) -> Iterator[Change]:
    """Options of a router that stand beside those of its experts; arguments as in ``model_changes``."""
    if not isinstance(node, yaml.MappingNode) or not isinstance(given, Mapping):
        return
    new = upgraded_ffn(given, over if isinstance(over, Mapping) else None)
    router = dict(new.get("router", {}))
    names: dict[int, str | None] = {}
    changes: list[Change] = []
    for place, (key, _) in enumerate(node.value):
        if key.value not in MOVED or key.value in new:
            continue
        name, before = MOVED[key.value][-1], given[key.value]
        as_written = name in router and router[name] == before
        names[place] = name if as_written else None
        change = Change((*path, key.value), f"is {show_path((*path, *_today(key.value, router)))} today")
        if as_written:
            del router[name]
        if "router" in given:
            change = _by_hand(change, "an option of its router beside router", "write it below router")
        changes.append(change)
    if names and all(change.problem is None for change in changes):
        edits = source.move(node, names, "router", router) if "router" in new else source.remove(node, names)
        changes[0] = replace(changes[0], edits=tuple(edits))
    yield from changes


def _plan_changes(document: Document, source: Source) -> list[Change]:
    """The earlier fields of a plan without mistakes."""
    tree, node = document.tree, document.node
    assert isinstance(node, yaml.MappingNode), "the plan was read before"
    model = tree.get("model", {})
    file = _model_file(tree)
    below = {} if file is None else read_yaml(file.read_text(encoding="utf-8")).tree
    whole = merged(below, model)
    kind = kind_of(whole)
    changes: list[Change] = []
    for key, value in node.value:
        if key.value == "model":
            changes += model_changes(source, ("model",), value, model, kind, below.get("ffn"))
        elif key.value == "stages":
            for index, (stage, part) in enumerate(zip(tree["stages"], value.value, strict=True)):
                for name, section in part.value:
                    if name.value == "model":
                        at = ("stages", index, "model")
                        changes += model_changes(source, at, section, stage["model"], kind, whole.get("ffn"))
    return changes


def _file_changes(document: Document, source: Source) -> list[Change]:
    return list(model_changes(source, (), document.node, document.tree, kind_of(document.tree), None))


def _model_file(tree: Mapping[str, Any]) -> FilePath | None:
    """The file over which a plan lays its model, if there is one."""
    preset = str(tree.get("model", {}).get("preset"))
    return FilePath(preset) if preset.endswith((".yaml", ".yml")) else None


def _todays(model: Mapping[str, Any]) -> dict[str, Any]:
    new = upgraded(model, kind_of(model))
    return {**new, "ffn": upgraded_ffn(new["ffn"])} if isinstance(new.get("ffn"), Mapping) else new


def _today(name: str, router: Mapping[str, Any]) -> tuple[str, ...]:
    """Where an option of a router stands today, from the filling on."""
    mean = "experts_per_token"
    return ("router", mean) if mean in router and name in ("top_k", "capacity_factor") else MOVED[name]


def _is_called(path: Path, value: object, before: object) -> str:
    return f"is {show_path(path)} today" + ("" if value == before else f", with the value {show(value)}")


def _by_hand(change: Change, got: str, remedy: str) -> Change:
    problem = Problem(change.path, f"{got}, in a field of earlier spelling", "one that can be rewritten", remedy)
    return replace(change, edits=(), problem=problem)
