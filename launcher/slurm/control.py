"""Queries and requests of a job to Slurm about itself."""

import re
import subprocess
import time
from collections.abc import Sequence

_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")

_TRIES, _SECONDS_BETWEEN_TRIES = 50, 0.2


def describe_job(job: int) -> dict[str, str]:
    """Fields of a job that have no blanks, by Slurm's names; empty if the controller does not answer."""
    done = _run("scontrol", "--oneliner", "show", "job", str(job))
    # The first of each name: later ones may be texts of users.
    return dict(reversed(_FIELD.findall(done.stdout))) if done.returncode == 0 else {}


def was_preempted(fields: dict[str, str]) -> bool:
    """Whether Slurm has taken the nodes back for another job."""
    return fields.get("PreemptTime", "None") not in ("None", "")


def was_cancelled(fields: dict[str, str]) -> bool:
    """Whether Slurm is ending the job: it calls that COMPLETING while something of the job still runs."""
    return fields.get("JobState") != "RUNNING"


def requeue(job: int, exclude: Sequence[str]) -> str | None:
    """Requeues a running job, which ends it here; nodes can only be excluded while it waits in the queue.

    Args:
        job: Its number.
        exclude: Nodes on which it should not run again, on top of those that it avoids already.

    Returns:
        The request that Slurm refused; None if it accepted all.
    """
    before = describe_job(job).get("ExcNodeList", "(null)")
    done = _run("scontrol", "requeue", str(job))
    if done.returncode != 0:
        return done.stderr.strip()
    if not exclude:
        return None
    avoided = ",".join(([] if before == "(null)" else [before]) + list(exclude))
    # Meanwhile Slurm ends the requesting job, first by TERM, which would end this scontrol as well.
    for _ in range(_TRIES):
        done = _run("scontrol", "update", f"JobId={job}", f"ExcNodeList={avoided}")
        if done.returncode == 0:
            return None
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return f"nodes {avoided} could not be excluded: {done.stderr.strip()}"


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
