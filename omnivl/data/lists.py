"""Lists of names that a plan can name: what the samples of the embedded sources show.

They lie in text files beside the drawings, so that a plan that names one is read without opening a source.
"""

from functools import cache
from pathlib import Path

EMBEDDED_LISTS = ("emoji", "emoji_labels", "motions")
"""The 1,599 names of the embedded drawings, their 95 classes, and the classes of ``source: motion``."""

_FOLDER = Path(__file__).parent / "embedded" / "lists"


@cache
def embedded_list(name: str) -> tuple[str, ...]:
    """One of ``EMBEDDED_LISTS``, each entry once."""
    return tuple((_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines())
