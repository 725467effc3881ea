"""The plan's ``model`` section before it is typed: a preset or a model file, overridden by the plan's own fields."""

import dataclasses
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

from engine.plan.plan import Plan
from engine.plan.schema import kinds
from engine.plan.yaml import Document, Path, Problem, read_yaml, show_value
from omnivl.architectures import Architecture, ArchitectureConfig, OmniVL
from omnivl.architectures.upgrades import successor, upgraded
from omnivl.data.plain_files import read_small
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, did_you_mean
from omnivl.parts.sizes import Transformer

DEFAULT_KIND = OmniVL.kind


def architectures() -> Mapping[str, type[Architecture]]:
    """The architectures that a plan can name, by kind."""
    return kinds(ArchitectureConfig)


def resolve_model(document: Document) -> list[Problem]:
    """Replaces ``model`` by the preset's fields, overridden by the given ones, in today's form.

    ``preset`` names one of the architecture's presets or a YAML file that holds a ``model`` section itself.

    Returns:
        What is wrong with the preset or the file.
    """
    given = document.tree.get("model", {})
    if not isinstance(given, dict):
        return []
    problems: list[Problem] = []
    preset = given.get("preset")
    if isinstance(preset, str) and preset.endswith((".yaml", ".yml")):
        given, problems = _over_file(document, given, preset)
        preset = given.get("preset")
    fields = upgraded({name: value for name, value in given.items() if name != "preset"}, DEFAULT_KIND)
    kind = str(fields.get("kind", DEFAULT_KIND))
    _upgrade_stages(document.tree, kind)
    _upgrade_places(document.places, kind)
    cls = architectures().get(kind, OmniVL)
    _fill_stacks(document, ("model",), fields, cls)
    stages = document.tree.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict) and isinstance(stage.get("model"), dict):
            own = architectures().get(str(stage["model"].get("kind", kind)), OmniVL)
            _fill_stacks(document, ("stages", index, "model"), stage["model"], own)
    base = cls()
    if isinstance(preset, str) and preset in cls.presets:
        base = cls.presets[preset]
    elif "preset" in given:
        known = f"{', '.join(map(repr, cls.presets))} or a YAML file" if cls.presets else "a YAML file"
        change = did_you_mean(str(preset), cls.presets, "choose one of these" if cls.presets else "leave it out")
        problems.append(Problem(("model", "preset"), show_value(preset), known, change))
    document.tree["model"] = {**merged(asdict(base), {**fields, "kind": base.kind}), "kind": kind}
    return problems


def _fill_stacks(document: Document, path: Path, fields: dict[str, Any], cls: type[Architecture]) -> None:
    """Gives ``ffn`` of an architecture that has it in each of its stacks to those stacks that do not name their own.

    Args:
        document: Whose places are told apart by stack.
        path: Of the section.
        fields: The section; changed in place.
        cls: The architecture.
    """
    if "ffn" not in fields or any(entry.name == "ffn" for entry in dataclasses.fields(cls)):
        return
    filling, given = fields.pop("ffn"), {place: at for place, at in document.places.items() if _within(place, path)}
    for stack in _stacks_in(cls()):
        holder: Any = fields
        for name in stack:
            holder = holder.setdefault(name, {}) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and "ffn" not in holder:
            holder["ffn"] = deepcopy(filling)
            for place, at in given.items():
                document.places.setdefault((*path, *stack, *place[len(path) :]), at)


def _within(place: Path, path: Path) -> bool:
    return place[: len(path) + 1] == (*path, "ffn")


def _stacks_in(part: Any) -> Iterator[tuple[str, ...]]:
    """The paths of the stacks that an architecture, or a part of it, has as fields."""
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if isinstance(value, Transformer):
            yield (entry.name,)
        elif dataclasses.is_dataclass(value):
            yield from ((entry.name, *below) for below in _stacks_in(value))


def carried(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the plan's model that a stage of another architecture inherits: those that both have."""
    kind = str(over["kind"])
    cls = architectures().get(kind)
    names = () if cls is None else [entry.name for entry in dataclasses.fields(cls)]
    known = upgraded({name: value for name, value in base.items() if name != "kind"}, kind)
    return {name: value for name, value in known.items() if name in names}


def _upgrade_stages(tree: dict[str, Any], kind: str) -> None:
    stages = tree.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("model"), dict):
            stage["model"] = upgraded(stage["model"], kind)


def _upgrade_places(places: dict[Path, str], kind: str) -> None:
    """Gives a renamed field the place of its earlier name, so that messages point to what the author wrote."""
    for path, place in list(places.items()):
        at = path.index("model") if "model" in path[:3] else None
        if at is not None and len(path) > at + 1:
            name = successor(str(path[at + 1]), kind)
            places.setdefault((*path[: at + 1], name, *path[at + 2 :]), place)


def resolve_vocabulary(document: Document) -> list[Problem]:
    """Sets sizes of the model's vocabularies to their tokenizers' where neither the plan nor its model file gives them.

    Returns:
        What is wrong with the tokenizers.
    """
    model, own = document.tree.get("model"), document.tree.get("tokenizer", Plan.tokenizer)
    if not isinstance(model, dict):
        return []
    cls = architectures().get(str(model.get("kind")), OmniVL)
    problems = _set_vocabulary(document, cls.vocabulary, ("tokenizer",), own)
    for section in cls.readers:
        holder = _section(model, section)
        given = None if holder is None else holder.get("tokenizer")
        path = ("tokenizer",) if given is None else ("model", *section, "tokenizer")
        problems += _set_vocabulary(document, (*section, "vocab_size"), path, own if given is None else given)
    return problems


def _set_vocabulary(document: Document, field: tuple[str, ...], path: tuple[str, ...], tokenizer: Any) -> list[Problem]:
    """Sets a field of the model to the size of a tokenizer, of which the plan says at ``path`` which it is."""
    holder = _section(document.tree["model"], field[:-1])
    if ("model", *field) in document.places or holder is None or not isinstance(tokenizer, str):
        return []
    try:
        holder[field[-1]] = load_tokenizer(tokenizer).special.vocab_size
    except DataError as error:
        allowed = "'emoji', a vocab.txt or the folder of a Hugging Face tokenizer"
        got = f"{tokenizer!r}, which cannot be loaded ({error})"
        return [Problem(path, got, allowed, f"name one that is there, or set model.{'.'.join(field)}")]
    return []


def _section(model: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """A section of the model; None where it is not there."""
    holder: Any = model
    for name in path:
        holder = holder.get(name) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) else None


def merged(base: Mapping[str, Any], over: Any) -> Any:
    """``over`` merged into ``base``, mapping by mapping; a mapping of another ``kind`` replaces the earlier one."""
    if not isinstance(over, Mapping) or ("kind" in base and over.get("kind", base["kind"]) != base["kind"]):
        return over
    result = dict(base)
    for name, value in over.items():
        result[name] = merged(base[name], value) if isinstance(base.get(name), Mapping) else value
    return result


def _over_file(document: Document, given: dict[str, Any], file: str) -> tuple[dict[str, Any], list[Problem]]:
    """Merges the plan's fields into a model file's; fields that only the file gives have places in the file."""
    own = {name: value for name, value in given.items() if name != "preset"}
    try:
        text = read_small(FilePath(file)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = f"{file!r}, which cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})"
        allowed = f"{', '.join(map(repr, OmniVL.presets))} or a YAML file"
        return own, [Problem(("model", "preset"), got, allowed, "name a file that is there")]
    read = read_yaml(text, file)
    problems = [Problem(("model", *bad.path), bad.got, bad.allowed, bad.change) for bad in read.problems]
    fields = read.tree if isinstance(read.tree, dict) else {}
    if not isinstance(read.tree, dict) and not problems:
        change = "write fields of a model into it"
        problems.append(
            Problem(("model", "preset"), f"{file!r}, which holds no mapping", "a mapping of fields", change)
        )
    document.places.pop(("model", "preset"), None)
    for path, place in read.places.items():
        if path:
            document.places.setdefault(("model", *path), place)
    return merged(fields, own), problems
