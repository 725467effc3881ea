"""How a failing run is told of: once, by the process that failed first."""

import os
import sys

FAILURE_FILE = "OMNIVL_FAILURE_FILE"
"""Names the file by which the processes of a launch settle who failed first. Set by our own launcher."""


def tell_failure(message: str) -> bool:
    """Prints a failure, unless another process of this launch has failed before and this one only lost its company.

    Returns:
        Whether it was printed.
    """
    file = os.environ.get(FAILURE_FILE)
    if file is not None:
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    print(message, file=sys.stderr, flush=True)
    return True
