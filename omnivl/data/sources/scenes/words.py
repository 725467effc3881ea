"""English about scenes: articles, plurals, numbers, lists."""

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

_PLURALS = {
    **{name: name for name in ("fish", "deer", "bison", "moose", "shrimp", "squid", "spaghetti", "sushi", "luggage")},
    **{"mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "scarf": "scarves", "fly": "flies"},
}


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


def counted(number: int, name: str) -> str:
    """So many of a thing: ``a cat``, ``two cats``."""
    return article(name) if number == 1 else f"{NUMBERS[number]} {plural(name)}"


def listed(parts: Sequence[str]) -> str:
    """Joins parts with commas and an ``and`` before the last one."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
