"""The plan's ``model`` section before it is typed: a preset or a model file, the plan's own fields over it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any, cast

from engine.plan.plan import Plan
from engine.plan.yaml import Document, Problem, read_yaml, show_value
from omnivl.architectures.presets import PRESETS
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, did_you_mean
from omnivl.parts.config import ModelConfig, PresetName


def resolve_model(document: Document) -> list[Problem]:
    """Replaces ``model`` by the preset's fields with the given ones over them.

    ``preset`` names a row of the table of presets or a YAML file that holds a ``model`` section itself.

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
    fields = {name: value for name, value in given.items() if name != "preset"}
    base = ModelConfig()
    if isinstance(preset, str) and preset in PRESETS:
        base = PRESETS[cast(PresetName, preset)]
    elif "preset" in given:
        known = ", ".join(repr(name) for name in PRESETS)
        change = did_you_mean(str(preset), PRESETS, "choose one of these")
        problems.append(Problem(("model", "preset"), show_value(preset), f"{known} or a YAML file", change))
    document.tree["model"] = merged(asdict(base), fields)
    return problems


def resolve_vocabulary(document: Document) -> list[Problem]:
    """Sets ``model.vocab_size`` to the tokenizer's where neither the plan nor its model file gives it.

    Returns:
        What is wrong with the tokenizer.
    """
    model, tokenizer = document.tree.get("model"), document.tree.get("tokenizer", Plan.tokenizer)
    if not isinstance(model, dict) or not isinstance(tokenizer, str) or ("model", "vocab_size") in document.places:
        return []
    try:
        model["vocab_size"] = load_tokenizer(tokenizer).special.vocab_size
    except DataError as error:
        allowed = "'emoji', a vocab.txt or the folder of a Hugging Face tokenizer"
        got = f"{tokenizer!r}, which cannot be loaded ({error})"
        return [Problem(("tokenizer",), got, allowed, "name one that is there, or set model.vocab_size")]
    return []


def merged(base: Mapping[str, Any], over: Any) -> Any:
    """``over`` laid over ``base``, mapping by mapping; one of another ``kind`` replaces what was there."""
    if not isinstance(over, Mapping) or ("kind" in base and over.get("kind", base["kind"]) != base["kind"]):
        return over
    result = dict(base)
    for name, value in over.items():
        result[name] = merged(base[name], value) if isinstance(base.get(name), Mapping) else value
    return result


def _over_file(document: Document, given: dict[str, Any], file: str) -> tuple[dict[str, Any], list[Problem]]:
    """Lays the plan's fields over a model file's; places of what the file alone gives lead into the file."""
    own = {name: value for name, value in given.items() if name != "preset"}
    try:
        text = FilePath(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = f"{file!r}, which cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})"
        allowed = f"{', '.join(map(repr, PRESETS))} or a YAML file"
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
