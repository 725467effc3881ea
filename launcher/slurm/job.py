"""Controls a job from its first node: ``python -m launcher.slurm.job SPEC``, which the batch script executes.

It checks the nodes, starts the ranks, passes USR1 on to them, names the rank that failed first, and requeues the job
where that helps. It imports neither torch nor DeepSpeed, since it has to handle signals from the beginning.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from engine.processes.belonging import SECRET, new_secret
from engine.telemetry.console import say
from engine.watch.failure import Failure, clear_failure, read_told
from launcher.slurm import blame, control
from launcher.slurm.allocation import Allocation, read_allocation
from launcher.slurm.progress import read_progress, saved_steps
from launcher.slurm.restarts import Restarts, judge
from launcher.slurm.spec import JobSpec, read_spec
from launcher.slurm.steps import RANK_LOGS, Step, srun, training_environment, training_step
from launcher.slurm.verdicts import bad_nodes, read_reports, unexplained
from omnivl.shown import printable

_END_SECONDS = 300
"""After a job has been put back into the queue Slurm ends it here, which takes as long as its other nodes need."""

_LOG_TAIL_LINES = 20
_ASKED = 128 + signal.SIGUSR1


class Job:
    """One start of one job."""

    def __init__(self, spec: JobSpec, file: Path, allocation: Allocation) -> None:
        """Prepares one start of a job.

        Args:
            spec: Description of the job.
            file: File of the description.
            allocation: Where it runs.
        """
        self._spec, self._file, self._allocation = spec, file, allocation
        self._run = Path(spec.tasks[allocation.task].folder)
        self._logs = self._run / "slurm" / allocation.label
        self._restarts = Restarts(
            self._run / "slurm" / "starts.jsonl", allocation.job, spec.profile.restarts_without_progress
        )
        self._asked = False
        self._step: Step | None = None
        self._bad: dict[str, str] = {}
        self._lost: list[str] = []
        self._said: list[str] = []
        signal.signal(signal.SIGUSR1, self._pass_on)
        # Slurm sends TERM to the ranks itself; here it must not end the job before its ranks.
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def run(self) -> int:
        """Runs the job; returns its exit code. The messages of a failed job are kept in the run's folder."""
        self._logs.mkdir(parents=True, exist_ok=True)
        clear_failure(self._run)
        code = self._go_through()
        if code != 0:
            Failure(code, "\n".join(self._said)).write(self._run)
        return code

    def _go_through(self) -> int:
        done = saved_steps(self._run)
        self._say(f"start {self._allocation.restart} on {', '.join(self._allocation.nodes)}, at step {done}")
        if (refusal := self._restarts.refusal(done)) is not None:
            self._say(refusal)
            return 1
        self._restarts.note(self._allocation.restart, done)
        if self._spec.profile.check.enabled and not self._check_nodes("before"):
            return self._again("a node is bad") if self._bad else 1
        code = _ASKED if self._asked else self._train()
        if code not in (0, 2, _ASKED) and not self._lost:
            if (outside := self._ended_from_outside(code)) is not None:
                return outside
            if self._spec.profile.check.enabled:
                self._check_nodes("after")
        verdict, why = judge(code, len(self._bad) + len(self._lost))
        if verdict == "again":
            return self._again(why, code)
        self._say(why)
        return code

    def _train(self) -> int:
        """Runs the training step; returns the exit code of the rank that failed first."""
        failure_file = self._logs / "failure"
        environment = training_environment(self._spec, self._allocation, failure_file)
        self._say(f"{self._spec.nodes * self._spec.processes_per_node} ranks; their logs: {self._logs}")
        code = self._follow(training_step(self._spec, self._allocation, self._logs), environment, None)
        assert self._step is not None
        told = read_told(failure_file)
        failure = self._first_failure(self._step.messages, told)
        code = blame.exit_code(code if failure is None else failure.code)
        if code == 0 and not self._is_complete():
            self._say("the ranks have ended without an error, but the run is not complete")
            return 1
        self._lost = blame.lost_nodes(self._step.messages)
        if code in (0, _ASKED, 128 + signal.SIGTERM):
            return code
        if self._lost:
            self._say(f"Slurm has lost {', '.join(self._lost)}")
            return code
        if failure is not None and failure.rank is not None:
            self._say(f"rank {failure.rank} on {failure.node} failed first: {failure.what}")
            self._show_tail(failure.rank)
        elif failure is not None:
            self._say(f"node {failure.node} failed first: {failure.what}")
        if told is not None and code <= 128:
            self._say(f"the first failure:\n{told.said.rstrip()}")
        return code

    def _first_failure(self, messages: Sequence[tuple[float, str]], told: Failure | None) -> blame.FailedRank | None:
        """The rank that failed first: srun reports it for ranks that it starts, deepspeed's ranks report themselves."""
        failure = blame.first_failure(messages)
        if self._spec.profile.launcher == "srun" or failure is None:
            return failure
        if told is None or told.rank is None:
            return replace(failure, rank=None)
        node = self._allocation.nodes[told.rank // self._spec.processes_per_node]
        return blame.FailedRank(told.rank, node, told.code, blame.describe_code(told.code))

    def _check_nodes(self, when: str) -> bool:
        """Whether all nodes pass their check. Names those that do not."""
        reports, check = self._logs / f"nodes-{when}", self._spec.profile.check
        reports.mkdir(exist_ok=True)
        environment = {"MASTER_ADDR": self._allocation.nodes[0], "MASTER_PORT": str(self._allocation.port)}
        environment[SECRET] = new_secret()
        module = [sys.executable, "-m", "launcher.slurm.check_node", str(self._file), str(reports), str(self._run)]
        start = srun(self._spec.nodes, 1, f"--output={reports}/node-%n.log")
        code = self._follow([*start, *module], environment, check.timeout_seconds)
        if self._asked and code != 0:
            return True  # the ranks are not started, and the job goes back into the queue
        found = read_reports(reports, self._allocation.nodes)
        self._bad = bad_nodes(found, self._allocation.nodes, check.clock_seconds)
        for node, why in self._bad.items():
            self._say(f"node {node} is bad: {why}")
        if code != 0 and not self._bad:
            self._say(f"the nodes failed their check: {unexplained(found) or f'see {reports}'}")
        return code == 0 and not self._bad

    def _follow(self, command: list[str], environment: dict[str, str], timeout: float | None) -> int:
        self._step = Step(command, {**os.environ, **environment})
        return self._step.wait(timeout)

    def _again(self, why: str, code: int = 1) -> int:
        """Requeues the job and waits for its end here; returns an exit code if it may not start again."""
        done = saved_steps(self._run)
        if (refusal := self._restarts.refusal(done)) is not None:
            self._say(f"{why}; {refusal}")
            return code
        without = f", without {', '.join(self._bad)}" if self._bad else ""
        self._say(f"{why}: back into the queue at step {done}{without}")
        refused = control.requeue(self._allocation.job, list(self._bad))
        if refused is not None:
            self._say(f"Slurm says: {refused}")
            return code
        time.sleep(_END_SECONDS)
        return code

    def _ended_from_outside(self, code: int) -> int | None:
        """The exit code of a job that Slurm has cancelled or preempted (and requeues); None for others.

        The exit code of TERM is no proof: it may belong to an earlier start, and deepspeed's launcher changes it.
        """
        fields = control.describe_job(self._allocation.job)
        if control.was_preempted(fields):
            return self._again("another job takes the nodes", code)
        if control.was_cancelled(fields):
            saved = "has saved" if code == 128 + signal.SIGTERM else f"ended with exit code {code}"
            self._say(f"the job is cancelled and {saved}; the run goes on when it is submitted again")
            return code
        return None

    def _is_complete(self) -> bool:
        """Whether the run is complete: deepspeed's launcher ends with 0 also when it is killed."""
        stages = [stage for stage in read_progress(self._run) if self._spec.stage in (None, stage.name)]
        return bool(stages) and all(stage.complete for stage in stages)

    def _show_tail(self, rank: int) -> None:
        for log in self._logs.glob(RANK_LOGS[self._spec.profile.launcher].format(rank)):
            lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            say("\n".join([f"--- the last lines of {log}", *map(printable, lines), "---"]))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._step is not None:
            self._step.signal(number)

    def _say(self, text: str) -> None:
        self._said.append(text)
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {self._allocation.label}: {text}")


def main() -> None:
    """Runs the job of this batch script."""
    file = Path(sys.argv[1])
    sys.exit(Job(read_spec(file), file, read_allocation(os.environ)).run())


if __name__ == "__main__":
    main()
