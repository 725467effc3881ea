"""The embedded emoji set: drawings in three styles and animated clips, with names, tags and subgroups."""

from omnivl.data.config import DataEntryConfig
from omnivl.data.emoji import unpack
from omnivl.data.sources.shards import ShardSource


def embedded_shards() -> tuple[str, ...]:
    """Paths of the plain shards; unpacked on first use.

    Raises:
        DataError: The package was installed without them.
    """
    return tuple(str(path) for path in unpack.embedded_shards())


def open_emoji(config: DataEntryConfig) -> ShardSource:
    """The embedded samples that an entry asks for."""
    return ShardSource(config, embedded_shards())
