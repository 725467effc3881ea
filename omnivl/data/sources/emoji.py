"""The embedded emoji set: drawings in three styles and animated clips, with names, tags and subgroups."""

from pathlib import Path

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.shards import ShardSource
from omnivl.errors import DataError

EMBEDDED = Path(__file__).parent.parent / "embedded"


def embedded_shards() -> tuple[str, ...]:
    """Paths of the shards that the package carries.

    Raises:
        DataError: The package was installed without them.
    """
    shards = tuple(sorted(str(path) for path in EMBEDDED.glob("*.tar")))
    if not shards:
        raise DataError(
            f"data source 'emoji': {EMBEDDED} has no shards; reinstall the package, or build them with "
            f"'omnivl data build emoji'"
        )
    return shards


def open_emoji(config: DataEntryConfig) -> ShardSource:
    """The embedded samples that an entry asks for. Its index is small and is never written into the package."""
    return ShardSource(config, embedded_shards(), keep_index=False)
