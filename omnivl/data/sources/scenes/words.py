"""English about scenes: articles, plurals and singulars, numbers, lists."""

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

_PLURALS = {
    **{name: name for name in ("fish", "deer", "bison", "moose", "shrimp", "squid", "spaghetti", "sushi", "luggage")},
    **{"mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "scarf": "scarves", "fly": "flies"},
    **{"man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth"},
}
_SINGULARS = {several: one for one, several in _PLURALS.items()}


def article(name: str) -> str:
    """A name with its article: ``an apple``, ``a pear``; a plural has none: ``grapes``."""
    if name.endswith("s") and plural(name) == name:
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu')) else 'a'} {name}"


def plural(name: str) -> str:
    """The plural of a name; a name that is one already stays as it is."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("ss", "x", "z", "ch", "sh", "us")):
        return f"{name}es"
    if name.endswith("s"):
        return name
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def singular(name: str) -> str:
    """The singular of a name; a name that is one already stays as it is.

    Where the ending leaves it open, the same is taken for a name and for its plural: "glass" for glasses of any kind.
    """
    if name in _SINGULARS:
        return _SINGULARS[name]
    if not name.endswith("s") or name.endswith(("ss", "us", "is")):
        return name
    shorter = [name[:-1]] if name.endswith("ouses") else [name[:-2], name[:-1]]  # houses, unlike buses
    tried = [f"{name[:-3]}y", *shorter] if name.endswith("ies") else shorter
    return next((one for one in tried if len(one) > 1 and plural(one) == name), name)


def counted(number: int, name: str) -> str:
    """So many of a thing: ``a cat``, ``two cats``."""
    return article(name) if number == 1 else f"{NUMBERS[number]} {plural(name)}"


def listed(parts: Sequence[str]) -> str:
    """Joins parts with commas and an ``and`` before the last one."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
