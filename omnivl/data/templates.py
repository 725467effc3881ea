"""Texts with places in braces, such as ``a photo of {label}``.

They come from plans and command lines. ``str.format`` would fail at a place that it does not know, and would read
attributes and widths that a text names; here a place is a name and nothing else.
"""

import re
from collections.abc import Mapping, Sequence

_PLACE = re.compile(r"\{([^{}]*)\}")


def unknown_places(template: str, names: Sequence[str]) -> list[str]:
    """What stands in braces and is none of the names, with its braces; a brace alone where it has no partner."""
    places = [match.group() for match in _PLACE.finditer(template) if match.group(1) not in names]
    return places + re.findall(r"[{}]", _PLACE.sub("", template))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The text with the values of its places. Braces within a value stay as they are, as do other places."""
    return _PLACE.sub(lambda match: values.get(match.group(1), match.group()), template)
