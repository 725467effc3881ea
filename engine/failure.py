"""How a failing run is told of: once, by the process that failed first."""

import os
import sys
from pathlib import Path

FAILURE_FILE = "OMNIVL_FAILURE_FILE"
"""Names the file by which the processes of a launch settle who failed first; it then holds what that one said. Set by
our own launcher and by jobs of Slurm, in a folder that all processes share."""

HUNG = 75
"""Exit code of a run that hung: EX_TEMPFAIL, as the same command goes on from the newest whole checkpoint."""


def tell_failure(message: str) -> bool:
    """Prints a failure, unless another process of this launch has failed before and this one only lost its company.

    Returns:
        Whether it was printed.
    """
    file = os.environ.get(FAILURE_FILE)
    if file is not None:
        try:
            with Path(file).open("x", encoding="utf-8") as first:
                first.write(message + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            message += f"\n({file} could not be written: {error})"
    print(message, file=sys.stderr, flush=True)
    return True
