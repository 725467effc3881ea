"""Errors that a user caused and can mend. Our own broken invariants are plain assertions instead."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from omnivl.shown import printable


class UserError(ValueError):
    """A mistake in what the user gave us.

    The message names where it is, what was got, what is allowed and what to change. The command line prints it without
    a traceback. It may quote names and texts of data, so that it is kept ``printable``.
    """

    def __init__(self, message: str = "") -> None:
        """Takes the message."""
        super().__init__(printable(message, keep="\n\t"))


class DataError(UserError):
    """Training or evaluation data is unreadable, empty or broken beyond the share that the plan tolerates."""


class ModelError(UserError):
    """A model configuration or a weight file does not fit together."""


@dataclass(frozen=True)
class Misfit:
    """Something in a configuration that does not fit to the rest of it.

    Attributes:
        path: The field, from the configuration on.
        got: What stands there.
        allowed: What may stand there.
        change: What to do about it.
    """

    path: tuple[str, ...]
    got: str
    allowed: str
    change: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: got {self.got}; allowed {self.allowed}; {self.change}"


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Advice on an unknown word: ``did you mean 'X'?`` for the most similar known one, else ``otherwise``."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]!r}?" if found else otherwise


def reason_of(error: BaseException) -> str:
    """What an error says: of the operating system's its words alone, since whoever prints it names the file."""
    return getattr(error, "strerror", None) or str(error)
