"""How a failing run is told of: once, by the process that failed first; and what its folder keeps of it."""

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.disk.run_folder import write_whole
from omnivl.errors import UserError

FAILURE_FILE = "OMNIVL_FAILURE_FILE"
"""Names the file by which the processes of a launch settle who failed first; it then holds the ``Failure``. Set by our
own launcher and by jobs of Slurm, in a folder that all processes share."""

DEBUG = "OMNIVL_DEBUG"
"""Set to anything, errors come with their tracebacks."""

_FILE = "failure.json"

HUNG = 75
"""Exit code of a run that hung: EX_TEMPFAIL, as the same command goes on from the newest whole checkpoint."""


def describe_error(error: Exception) -> str:
    """What is said of an error: a user's mistake by its message alone, unless tracebacks are asked for."""
    if os.environ.get(DEBUG):
        return "".join(traceback.format_exception(error)).rstrip()
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Failure:
    """How a run ended, where it ended badly.

    Attributes:
        code: Exit code.
        said: The last lines that it said.
        rank: Who failed first, where that is known and the others have not failed of the same.
    """

    code: int
    said: str
    rank: int | None = None

    def write(self, run: Path) -> None:
        """Leaves it in a run's folder, as what its last start came to."""
        write_whole(run / _FILE, self._as_json())

    def tell(self) -> None:
        """Prints it, unless another process of this launch has failed before and this one only lost its company."""
        message = self.said
        file = os.environ.get(FAILURE_FILE)
        if file is not None:
            try:
                with Path(file).open("x", encoding="utf-8") as first:
                    first.write(self._as_json())
            except FileExistsError:
                return
            except OSError as error:
                message += f"\n({file} could not be written: {error})"
        print(message, file=sys.stderr, flush=True)

    def _as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_failure(run: Path) -> Failure | None:
    """What ``Failure.write`` left in a run's folder, if anything."""
    return read_told(run / _FILE)


def read_told(file: Path) -> Failure | None:
    """What ``Failure.tell`` left in the file of a launch; None where there is nothing, or the disk was full."""
    try:
        return Failure(**json.loads(file.read_bytes())) if file.is_file() else None
    except json.JSONDecodeError:
        return None


def clear_failure(run: Path) -> None:
    """Forgets it: the run is started again."""
    (run / _FILE).unlink(missing_ok=True)


def ended_by(rank: int, number: int) -> str:
    """What is said of a rank that a signal has ended."""
    return f"rank {rank} was ended by {signal.Signals(number).name}"
