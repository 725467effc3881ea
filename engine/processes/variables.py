"""Numbers in the variables that a launcher sets. Launchers import it: no torch."""

from collections.abc import Mapping

from omnivl.errors import UserError

_LARGEST = (1 << 32) - 1
_DIGITS = 20
"""More than any allowed number has."""


class LaunchError(UserError):
    """A launcher has not said rightly who a process is, or the processes of a run did not come together."""


def number_in(
    environment: Mapping[str, str], name: str, least: int = 0, most: int = _LARGEST, absent: int | None = None
) -> int:
    """The number in a variable.

    Args:
        environment: All variables.
        name: Of the variable.
        least: Smallest number that is allowed.
        most: Largest one.
        absent: What it is where the variable is not set; None where it has to be.

    Raises:
        LaunchError: It is not set, or is no such number.
    """
    if absent is not None and name not in environment:
        return absent
    text = environment.get(name, "nothing")
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and least <= int(text) <= most):
        got = f"got {text[: 2 * _DIGITS]}; allowed are numbers from {least} to {most}"
        raise LaunchError(f"{name}: {got}; mend it where the launcher sets it")
    return int(text)
