"""Errors of plans and checkpoints that a user can correct."""

import errno
from collections.abc import Sequence
from pathlib import Path

from omnivl.errors import UserError
from omnivl.shown import printable

_IN_ITS_PLACE = frozenset({errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR})
"""Errors of the operating system where a link, a folder, a pipe or a device lies in a file's place."""


class PlanError(UserError):
    """A plan that cannot be run. Carries every problem of the file, not just the first.

    Attributes:
        problems: One line each: ``file:line: path: got X; allowed Y; change Z``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        """Joins the problems into one message, one per line."""
        self.problems = tuple(printable(one, keep="\n\t") for one in problems)
        super(UserError, self).__init__("\n".join(self.problems))  # past UserError, which would do it once more


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or changed, or does not fit the run that reads it."""


class RunFileError(UserError):
    """A file of a run is cut or changed, or cannot be written."""


def unwritable(path: Path | str, error: OSError) -> RunFileError:
    """The error for a file that could not be written."""
    remedy = "make room or mend the disk"
    if error.errno in _IN_ITS_PLACE:
        path, remedy = error.filename or path, "remove it"
    return RunFileError(
        f"{path}: could not be written ({error.strerror or error}); {remedy}, and give the same command again: a run "
        "goes on from its newest whole checkpoint"
    )


class RunError(UserError):
    """A run that a program started has ended before its last step."""
