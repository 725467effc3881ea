"""The embedded emoji set: drawings and animated clips, with names, tags and subgroups.

``emoji`` has every concept in three styles, and the clips. ``emoji_hands`` has these and the drawings of five further
hands. The former stays as it is when hands are added, since the order of samples depends on their number.
"""

from omnivl.data.config import DataEntryConfig
from omnivl.data.emoji import unpack
from omnivl.data.sources.shards import ShardSource

EMBEDDED = ("emoji", "emoji_hands")
"""Names of the sources."""


def embedded_shards(source: str) -> tuple[str, ...]:
    """Paths of the plain shards of one of ``EMBEDDED``; unpacked on first use.

    Raises:
        DataError: The package was installed without them.
    """
    parts = (unpack.CORE,) if source == "emoji" else (unpack.CORE, unpack.HANDS)
    return tuple(str(path) for part in parts for path in unpack.embedded_shards(part))


def open_emoji(config: DataEntryConfig) -> ShardSource:
    """The embedded samples that an entry asks for."""
    return ShardSource(config, embedded_shards(config.source))
