"""What any command takes for a number, a path and a text of its command line, beside the ranges that options state."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from engine.plan.limits import limit_of
from engine.plan.yaml import show_value
from omnivl.errors import UserError

_LONGEST = 100_000
_LONGEST_PATH = 4_096
_SHOWN = 60


def keep_in_range(command: Any) -> None:
    """Gives each option and argument of a command, and of those below it, the checks of this file.

    Numbers have the limits of plans' fields of that name (``engine.plan.limits``).

    Args:
        command: A click command that Typer made; changed in place.
    """
    for parameter in command.params:
        _check(parameter)
    for one in getattr(command, "commands", {}).values():
        keep_in_range(one)


def _check(parameter: Any) -> None:
    """Puts the checks before and behind the parameter's own reading of its value."""
    read = parameter.process_value
    descriptor = getattr(parameter, "type_descriptor", None)
    takes_path = descriptor is not None and Path in (descriptor.annotation, *get_args(descriptor.annotation))
    said = next((one for one in parameter.opts if one.startswith("--")), parameter.name)

    def process_value(context: Any, given: Any) -> Any:
        for text in _each(given):
            if isinstance(text, str):
                _require_text(said, text)
                if takes_path:
                    _require_path(said, text)
        value = read(context, given)
        for number in _each(value):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _require_number(said, parameter.name, number)
        return value

    parameter.process_value = process_value


def _each(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    elif value is not None:
        yield value


def _require_text(said: str, text: str) -> None:
    if len(text) > _LONGEST:
        got = f"{_cut(text)} of {len(text):,} characters"
        raise UserError(f"{said}: got {got}; allowed at most {_LONGEST:,}; shorten it, or write it into a file")
    if any(unicodedata.category(one) == "Cc" and one not in "\n\t" for one in text):
        raise UserError(f"{said}: got {_cut(text)}; allowed a text without control characters; take them out")


def _require_path(said: str, text: str) -> None:
    if not text.strip():
        raise UserError(f"{said}: got {text!r}; allowed a path; name one ('.' is the folder you are in)")
    if len(text.encode(errors="surrogateescape")) > _LONGEST_PATH:
        raise UserError(f"{said}: got {_cut(text)}; allowed a path of at most {_LONGEST_PATH:,} bytes; shorten it")


def _require_number(said: str, name: str, number: float) -> None:
    limit = limit_of(name)
    if not limit.low <= number <= limit.high:  # as NaN is not
        raise UserError(f"{said}: got {show_value(number)}; allowed {limit}; change the number")


def _cut(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r} ..."
