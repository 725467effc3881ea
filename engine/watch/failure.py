"""Reports of failed runs: the process that failed first prints the failure once and writes it into the run's folder."""

import json
import os
import signal
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.disk.run_folder import write_whole
from engine.telemetry.console import say
from omnivl.errors import UserError

FAILURE_FILE = "OMNIVL_FAILURE_FILE"
"""Names a file that the first process of a launch to fail creates, with its ``Failure``. Set by our own launcher and by
jobs of Slurm, in a folder that all processes share."""

DEBUG = "OMNIVL_DEBUG"
"""Where this variable is set, errors are printed with their tracebacks."""

_FILE = "failure.json"

HUNG = 75
"""Exit code of a run that hung: EX_TEMPFAIL, since the same command resumes from the newest whole checkpoint."""


def describe_error(error: Exception) -> str:
    """The text of an error: for a user's mistake the message alone, unless tracebacks are enabled."""
    if os.environ.get(DEBUG):
        return "".join(traceback.format_exception(error)).rstrip()
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Failure:
    """How a failed run ended.

    Attributes:
        code: Exit code.
        said: The last lines that the run printed.
        rank: The process that failed first; None if unknown, or if all fail for the same reason.
    """

    code: int
    said: str
    rank: int | None = None

    def write(self, run: Path) -> None:
        """Writes it into a run's folder, as the outcome of the last start."""
        write_whole(run / _FILE, self._as_json())

    def tell(self) -> None:
        """Prints it, unless another process of this launch has failed before, which is then the cause."""
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
        say(message, err=True)

    def _as_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_failure(run: Path) -> Failure | None:
    """What ``Failure.write`` left in a run's folder, if anything."""
    return read_told(run / _FILE)


def read_told(file: Path) -> Failure | None:
    """What ``Failure.tell`` left in the file of a launch; None where there is nothing, or the disk was full."""
    try:
        return Failure(**json.loads(file.read_bytes())) if file.is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def clear_failure(run: Path) -> None:
    """Removes it, when the run is started again."""
    (run / _FILE).unlink(missing_ok=True)


def ended_by(rank: int, number: int) -> str:
    """The message about a rank that a signal has ended."""
    return f"rank {rank} was ended by {signal.Signals(number).name}"
