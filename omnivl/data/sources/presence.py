"""Whether the files that a source names are there and can be read, and what to say if they are not."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from omnivl.errors import DataError, reason_of

_SHOWN = 5


def why_unreadable(path: str) -> str | None:
    """Why a shard cannot be read; None if nothing speaks against it. Opens nothing."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a million of them
    except (OSError, ValueError) as error:
        return _why_absent(path, reason_of(error))
    if not stat.S_ISREG(status.st_mode):
        return "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
    if status.st_size == 0:
        return "empty"
    return None if os.access(path, os.R_OK) else "Permission denied"


def unreadable_shards(source: str, wrong: Sequence[tuple[str, str]], looked_at: int) -> DataError:
    """The error that names shards of a source that cannot be read.

    Args:
        source: As it was given.
        wrong: Paths and reasons.
        looked_at: Number of shards among which these were found.
    """
    shown = ", ".join(f"{path} ({reason})" for path, reason in wrong[:_SHOWN])
    more = f" and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
    return DataError(
        f"data source {source!r}: {len(wrong):,} of {looked_at:,} shards cannot be read: {shown}{more}; allowed are "
        f"tar files that are there; the working folder is {Path.cwd()}; fetch them, or change the path"
    )


def _why_absent(path: str, reason: str) -> str:
    """Why nothing is at a path, with what its author may not know: where a link leads, what is there instead."""
    if "\0" in path:
        return reason
    if os.path.islink(path):  # noqa: PTH114
        return f"a link to {os.readlink(path)}, where nothing is"  # noqa: PTH115
    if "$" in path:
        return f"{reason}, and a variable that is not set stays as it is written"
    return f"{reason}, but there is {path}.tar" if os.path.isfile(f"{path}.tar") else reason  # noqa: PTH113
