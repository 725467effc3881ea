"""Lists of names that a plan can name: what the samples of the embedded sources show."""

from collections.abc import Callable, Mapping
from functools import cache

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.motion_poses import MOTION_CLASSES


@cache
def _emoji(field: str) -> tuple[str, ...]:
    """The values of a field of the embedded drawings, each once, in the order of the samples."""
    drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where={"style": ("fluent",)}))
    return tuple(dict.fromkeys(str(drawings.read(index).meta[field]) for index in range(len(drawings))))


_LISTS: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "emoji": lambda: _emoji("name"),
    "emoji_labels": lambda: _emoji("label"),
    "motions": lambda: tuple(sorted(MOTION_CLASSES)),
}

EMBEDDED_LISTS = tuple(_LISTS)
"""``emoji``: the 1,599 names of the embedded drawings; ``emoji_labels``: their classes; ``motions``: those of
``source: motion``."""


def embedded_list(name: str) -> tuple[str, ...]:
    """One of ``EMBEDDED_LISTS``.

    Raises:
        DataError: The package was installed without the drawings.
        KeyError: There is no such list.
    """
    return _LISTS[name]()
