"""How a text of data, plans or foreign files is shown to people: on consoles, in pages, in charts, in names of files.

Such texts come from anybody. A terminal obeys escape sequences, a page obeys tags, and characters that turn the
direction of writing make a text look like another one. Every room shows them through this file; consoles and
tables of ``engine.telemetry.console`` and templates of ``omnivl.pages`` do so on their own.
"""

import html
import json
import re
import unicodedata
from collections.abc import Iterable

_JOINERS = "\u200c\u200d"
"""Invisible, but letters of Persian and of Indian scripts and joined emoji need them."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of controls, formats (turns of direction, invisible marks), lone surrogates, ends of lines."""

_UNSAFE = re.compile(r"[^A-Za-z0-9.+_]+")
_DATA_PICTURE = re.compile(r"data:image/(?:png|jpeg|webp|gif|avif);base64,[A-Za-z0-9+/=]*")
_LONGEST_FILE_NAME = 120


def printable(text: object, *, keep: str = "") -> str:
    r"""A text on one line, with what a terminal would obey or hide written out: ``\x1b``, ``\n``, ``\u202e``.

    Args:
        text: A text, or a thing whose ``str`` is shown.
        keep: Characters that are shown as they are all the same, such as the newlines of a message of several lines.
    """
    given = str(text)
    if given.isprintable():
        return given
    return "".join(one if one in keep or _is_shown(one) else _written_out(one) for one in given)


def _is_shown(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _HIDDEN


def _written_out(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def printable_json(text: str) -> str:
    """A text in JSON, of the same value, without characters that a terminal would obey or hide."""
    return "".join(one if one == "\n" or _is_shown(one) else json.dumps(one)[1:-1] for one in text)


def chart_text(text: object) -> str:
    """A text inside a Plotly figure, which reads a part of HTML (links, line breaks) in names, titles and ticks."""
    return html.escape(printable(text), quote=False)


def markdown_text(text: object) -> str:
    """A text inside Markdown, a cell of a table included: its signs and tags are letters like others."""
    return re.sub(r"([\\`*_\[\]<|&])", r"\\\1", printable(text))


def data_picture(source: object) -> str:
    """The source of a picture of a page if it carries its pixels itself; else "", so that nothing is fetched."""
    return source if isinstance(source, str) and _DATA_PICTURE.fullmatch(source) else ""


def file_name(text: str) -> str:
    """A part of a file's name: letters, digits and ``.+_-``, all else as ``-``; never hidden, empty or a folder."""
    return _UNSAFE.sub("-", text).strip("-.")[:_LONGEST_FILE_NAME] or "x"


def file_names(texts: Iterable[str]) -> dict[str, str]:
    """``file_name`` of each text, numbered from the second on where two are alike (also on disks that ignore case)."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(texts):
        name, number = file_name(text), 1
        while (numbered := name if number == 1 else f"{name}-{number}").casefold() in taken:
            number += 1
        taken.add(numbered.casefold())
        names[text] = numbered
    return names
