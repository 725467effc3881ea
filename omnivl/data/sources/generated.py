"""The sources that draw their samples: the kinds of samples that each makes, and the check of what is asked of it.

Options of a source stand in a data entry's ``where``, beside the filter of the drawings that it draws with.
"""

from collections.abc import Collection, Mapping, Sequence

from omnivl.data.batch import DATA_KINDS, DataKind, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.errors import DataError

GENERATED: Mapping[str, tuple[DataKind, ...]] = {
    "motion": tuple(kind for kind in DATA_KINDS if is_video(kind)),
    "questions": ("image_text",),
    "scenes": ("image_text", "image", "images_text", "video_text", "video"),
}
"""The first kind is what a source makes where nothing else is said."""

PARTS = ("train", "val", "test")
"""Values of the option ``part``, the first by default: endless supplies of samples that have none in common."""


def check_kind(config: DataEntryConfig, allowed: Sequence[DataKind] | None = None, of: str = "") -> None:
    """Refuses an entry whose kind a source does not make.

    Args:
        config: The entry.
        allowed: Kinds that it makes; None for those of ``GENERATED``.
        of: For what, or why, these are allowed, in the message.

    Raises:
        DataError: It is another kind.
    """
    makes = GENERATED[config.source] if allowed is None else allowed
    if config.kind not in makes:
        known = ", ".join(map(repr, makes))
        raise DataError(f"data source {config.source!r}: kind is {config.kind!r}; allowed{of}: {known}; change it")


def chosen(
    config: DataEntryConfig, option: str, allowed: Sequence[str], default: Sequence[str], *, several: bool = False
) -> tuple[str, ...]:
    """What ``where`` says for an option of a source.

    Args:
        config: The entry.
        option: Name of the option.
        allowed: Its values.
        default: What is taken where it is not given.
        several: Whether more than one value may be given.

    Raises:
        DataError: There is another value, none, or more than one where that is not allowed.
    """
    if option not in config.where:
        return tuple(default)
    given = tuple(config.where[option])
    if not given or not set(given) <= set(allowed) or (len(given) > 1 and not several):
        known = ", ".join(allowed) or "none"
        raise DataError(
            f"data source {config.source!r}: where.{option} is {list(given)}; allowed: "
            f"{'' if several else 'one of '}{known}; change it"
        )
    return given


def drawings_of(config: DataEntryConfig, options: Collection[str]) -> dict[str, tuple[str, ...]]:
    """What ``where`` says beside a source's options: the filter of the drawings."""
    return {name: values for name, values in config.where.items() if name not in options}
