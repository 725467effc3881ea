"""Lists of texts in a plan: given as such, or as the path of a text file."""

import os
from collections.abc import Iterator
from pathlib import Path

from omnivl.data.plain_files import MAX_TEXT_FILE, read_small, text_lines
from omnivl.errors import Misfit, UserError


def list_or_path(texts: str | tuple[str, ...], where: str, option: str, expected: int | None) -> str | tuple[str, ...]:
    """The list; or its path, where the file is not there and a plan says how many texts it will hold.

    Sizes are then known, and what needs the texts themselves calls ``read_list``, which says that they are missing.

    Args:
        texts: See ``read_list``.
        where: Likewise.
        option: Likewise.
        expected: Length of the list; None if it is not known.

    Raises:
        UserError: See ``read_list``.
    """
    if isinstance(texts, str) and expected is not None and not os.path.lexists(texts):
        return texts
    return read_list(texts, where, option)


def read_list(texts: str | tuple[str, ...], where: str, option: str) -> tuple[str, ...]:
    """The list.

    Args:
        texts: The list, or the path of a text file with a text on each line.
        where: Location of the option, for messages.
        option: Its name.

    Raises:
        UserError: There is no such file, or a text occurs twice or is empty.
    """
    if isinstance(texts, str):
        allowed = f"allowed is a text file with one of the {option} on each line, or the list itself; change it"
        try:
            text = read_small(Path(texts), MAX_TEXT_FILE).decode("utf-8-sig")
        except FileNotFoundError as error:
            what = f"there is no such file (working folder {Path.cwd()})"
            raise UserError(f"{where}: {option} is {texts!r}, and {what}; {allowed}") from error
        except (OSError, UnicodeDecodeError) as error:
            what = f"it cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})"
            raise UserError(f"{where}: {option} is {texts!r}, and {what}; {allowed}") from error
        texts = tuple(text_lines(text))
    seen: set[str] = set()
    for place, one in enumerate(texts):
        if one in seen or not one.strip():
            what = f"{one!r} a second time" if one in seen else "an empty text"
            raise UserError(f"{where}: {option}.{place} is {what}; allowed is each once; remove it")
        seen.add(one)
    return tuple(texts)


def length_misfits(texts: str | tuple[str, ...], expected: int | None, option: str, count: str) -> Iterator[Misfit]:
    """A list of another length than the one that a plan states.

    Args:
        texts: The list; a path that is not there has the stated length.
        expected: The stated length; None if there is none.
        option: Name of the option with the list.
        count: Name of the option with its length.
    """
    if expected is not None and not isinstance(texts, str) and expected != len(texts):
        yield Misfit((count,), str(expected), f"{len(texts)}, the number of {option} in the list", "change either")


def stand_ins(count: int) -> tuple[str, ...]:
    """A list of that length, for counting."""
    return tuple(map(str, range(count)))
