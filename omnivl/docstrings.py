"""What docstrings say about fields: the plan's reference and the options of commands are written from it."""

import inspect
import re

_ENTRY = re.compile(r"^    (\w+): (.+(?:\n      +.+)*)", re.M)


def attribute_texts(cls: type) -> dict[str, str]:
    """The descriptions of the ``Attributes`` sections of a class and its bases, by field, on one line each."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        block = section(base, "Attributes")
        texts |= {name: " ".join(text.split()) for name, text in _ENTRY.findall(block)}
    return texts


def section(cls: type, title: str) -> str:
    """The indented lines of one section of a class's own docstring; nothing where it has none."""
    _, _, rest = inspect.cleandoc(cls.__doc__ or "").partition(f"\n{title}:\n")
    return re.split(r"\n(?=\S)", rest)[0].rstrip()
