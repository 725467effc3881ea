"""Where samples come from. A new source is one new file and one more case in ``open_source``."""

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.base import Source
from omnivl.data.sources.opening import is_stream
from omnivl.errors import DataError

__all__ = ["is_stream", "open_source"]


def open_source(
    config: DataEntryConfig, *, seed: int, index_cache: str | None = None, num_frames: int = 8, size: int = 64
) -> Source:
    """Opens what ``config.source`` names.

    Args:
        config: The entry.
        seed: Seed of generated sources.
        index_cache: Folder for shard indexes; None for beside each shard.
        num_frames: Frames that generated clips have at least.
        size: Side that generated clips have at least, in pixels.

    Raises:
        DataError: There is no such source, it has no sample of this kind, or it is a stream.
    """
    # Imported here, since the modules of sources import ``base`` of this package, which has to be complete by then.
    if config.source in ("emoji", "emoji_hands"):
        from omnivl.data.sources.emoji import open_emoji

        return open_emoji(config)
    if config.source == "motion":
        from omnivl.data.sources.motion import MotionSource

        return MotionSource(config, seed=seed, num_frames=max(8, num_frames), size=max(64, size))
    if config.source == "questions":
        from omnivl.data.sources.questions import QuestionSource

        return QuestionSource(config, seed=seed)
    if config.source == "scenes":
        from omnivl.data.sources.scenes import SceneSource

        return SceneSource(config, seed=seed, num_frames=num_frames, size=size)
    if is_stream(config.source):
        raise DataError(
            f"data source {config.source!r}: a stream has no list of samples; it can be trained on, but for this use "
            f"copy its shards to a disk"
        )
    from omnivl.data.sources.patterns import expand_pattern
    from omnivl.data.sources.shards import ShardSource

    return ShardSource(config, expand_pattern(config.source), index_folder=index_cache)
