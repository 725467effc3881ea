"""``docs/trace.md`` is correct: its files and symbols exist, and so do the calls that it names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE = (ROOT / "docs" / "trace.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| (\d)\. \w+ \| `([\w/.]+)` \| (.*?) \| `(\w+)` \|$", TRACE, re.MULTILINE)
CALLS = re.findall(r"^- `([\w/.]+)` calls `([\w.]+)` of `([\w/.]+)`$", TRACE, re.MULTILINE)


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def symbols(file: str) -> set[str]:
    """Functions and classes of a file, methods with and without their class."""
    names: set[str] = set()
    for node in parse(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [member.name for member in node.body if isinstance(member, ast.FunctionDef)]
            names |= set(methods) | {f"{node.name}.{method}" for method in methods}
    return names


def imported(file: str) -> dict[str, str]:
    """Imported names and the files that they come from."""
    found: dict[str, str] = {}
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = ROOT / node.module.replace(".", "/")
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            found |= {alias.asname or alias.name: source.relative_to(ROOT).as_posix() for alias in node.names}
    return found


def called(file: str) -> set[str]:
    """What is called in a file: ``f`` for ``f(...)``, ``A.f`` for ``A.f(...)``."""
    return {ast.unparse(node.func) for node in ast.walk(parse(file)) if isinstance(node, ast.Call)}


def test_there_are_nine_steps_in_nine_files() -> None:
    assert [int(number) for number, *_ in STEPS] == list(range(1, 10))
    assert len({file for _, file, *_ in STEPS}) == 9
    assert len(CALLS) >= 10


def test_every_file_exists() -> None:
    files = set(re.findall(r"`((?:engine|omnivl|launcher|moe|tests)/[\w/]+\.py)`", TRACE))
    assert len(files) >= 15
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize(("file", "text"), [(file, text) for _, file, text, _ in STEPS])
def test_symbols_to_look_at_exist(file: str, text: str) -> None:
    first, *others = re.findall(r"`([A-Za-z_][\w.]*)`", text)
    assert first in symbols(file)
    known = symbols(file) | set(imported(file))
    for name in others:
        assert name in known or (ROOT / name).exists() or _is_elsewhere(name), f"{name} is not in {file}"


@pytest.mark.parametrize(("file", "name"), [(file, name) for _, file, _, name in STEPS])
def test_each_step_uses_what_it_hands_on_by(file: str, name: str) -> None:
    source = imported(file).get(name)
    assert source is not None, f"{file} does not import {name}"
    uses = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Name) and node.id == name]
    assert uses, f"{file} imports {name} and does not use it"


@pytest.mark.parametrize(("caller", "name", "target"), CALLS)
def test_calls_are_really_there(caller: str, name: str, target: str) -> None:
    assert name in symbols(target), f"{target} has no {name}"
    holder = name.split(".")[0]
    source = imported(caller).get(holder)
    assert source is not None, f"{caller} does not import {holder}"
    assert source == target, f"{caller} imports {holder} from {source}"
    assert name in called(caller), f"{caller} does not call {name}"


def test_the_loop_of_the_chain_is_as_printed() -> None:
    source = ast.unparse(parse("omnivl/chain/chain.py"))
    assert re.search(r"for layer in self\.program:\s+state = layer\(state\)", source)


def _is_elsewhere(name: str) -> bool:
    """Names of other steps' symbols, such as the method that a host calls on the chain."""
    return any(name in symbols(file) for _, file, *_ in STEPS)
