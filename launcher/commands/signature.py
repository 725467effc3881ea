"""Options that several commands share: Typer reads a command's options from its signature."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any


def set_options(command: Callable[..., Any], options: Iterable[inspect.Parameter]) -> None:
    """Makes parameters of other functions the options of a command, which takes all of them by name.

    Args:
        command: Changed in place.
        options: In the order of the help.
    """
    named = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    vars(command)["__signature__"] = inspect.Signature(named)
    command.__annotations__ = {option.name: option.annotation for option in named}
