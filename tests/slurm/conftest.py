"""One Slurm for all tests of the session, and runs that are submitted to it."""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patience
import pytest
import torch
from metric_lines import comparable_lines
from safetensors.torch import load_file

from engine.disk.run_folder import RunFolder
from engine.telemetry.metrics import read_metrics
from engine.watch.heartbeat import read_sign

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from lab import Lab

ROOT = Path(__file__).parents[2]

PLAN = """
name: tiny
seed: 3
model: {preset: MODEL, dropout: 0.1, drop_path: 0.1}
parallel: {host: zero, zero_stage: 3, precision: fp32}
batch: {micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 2}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 100, keep_last: 2}
stages:
  - name: spatial
    steps: 12
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, {kind: univlc, queue_size: 24, batch_keys: momentum}]
    optimizer: {lr: 1e-3, warmup_steps: 2}
"""

CLUSTER = """
environment: {OMP_NUM_THREADS: "1", DS_ACCELERATOR: cpu, CUDA_VISIBLE_DEVICES: ""}
grace_seconds: 60
check: {enabled: CHECKED, free_gib: 0.1, free_memory_gib: 0.01, timeout_seconds: 60}
"""


_STORY: list[str] = []
"""What the tests did to jobs and nodes, and what jobs said of themselves: printed at the end."""

_SAID = re.compile(r"^[\d-]+ [\d:]+ (job \d+\S*: .+)$", re.MULTILINE)
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED")


class Cluster:
    """Submits runs to a Slurm, and waits for them."""

    def __init__(self, lab: "Lab", folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.plan = folder / "plan.yaml"
        self.write_plan(PLAN)
        for name, checked in (("cluster", "false"), ("checked", "true")):
            (folder / f"{name}.yaml").write_text(CLUSTER.replace("CHECKED", checked))

    def write_plan(self, text: str) -> None:
        self.plan.write_text(text.replace("MODEL", str(ROOT / "configs" / "models" / "debug.yaml")))

    def omnivl(self, *arguments: str, code: int = 0) -> str:
        """Runs a command of ours on the machine of the controller."""
        environment = {**self.lab.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "250", "OMP_NUM_THREADS": "1"}
        done = patience.run(
            [sys.executable, "-m", "launcher.cli", *arguments],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            limit=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, run: Path, *arguments: str, profile: str = "cluster") -> list[str]:
        """Submits the plan with ``run`` as its folder; returns the numbers of its jobs."""
        told = self.omnivl(
            *("submit", str(self.plan), "--run-folder", str(run), "--cluster", str(self.folder / f"{profile}.yaml")),
            *("--gpus-per-node", "0", "--time", "10:00", *arguments),
        )
        found = [line.split()[1].rstrip(":,") for line in told.splitlines() if line.startswith("job ")]
        self.tell(f"submitted {', '.join(found)}: {' '.join(arguments)}")
        return found

    def tell(self, what: str) -> None:
        """Writes down what the test does, for the summary."""
        _STORY.append(what)

    def tell_jobs(self) -> None:
        """Writes down what all jobs of the test have said in their logs."""
        for log in sorted(self.folder.rglob("slurm/*.log")):
            _STORY.extend(f"  {line}" for line in _SAID.findall(log.read_text(errors="replace")))

    def cancel(self, job: str, *options: str) -> None:
        """Cancels a job, or sends it a signal."""
        self.tell(f"scancel {' '.join([*options, job])}")
        self.lab.run("scancel", *options, job)

    def kill_node(self, node: int) -> None:
        """See ``Lab.kill_node``."""
        self.tell(f"killed node n{node}")
        self.lab.kill_node(node)

    def kill_rank(self, run: Path, rank: int) -> None:
        """Kills a process that trains: those of all nodes are processes of this machine."""
        self.tell(f"killed rank {rank}")
        os.kill(_process(run, rank), signal.SIGKILL)

    @contextmanager
    def held(self, run: Path) -> Iterator[None]:
        """Stops both ranks of a run, so that a fast one isn't over before the test has done what it wants."""
        processes = [_process(run, rank) for rank in range(2)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # Slurm has woken it, to end it
                    os.kill(process, signal.SIGCONT)

    def ended(self, job: str) -> bool:
        """Whether a job is over for good."""
        return self.lab.job(job)["JobState"] in _ENDED

    def finish(self, job: str, run: Path, state: str = "COMPLETED", limit: float = 200) -> str:
        """Waits for the end of a job and returns its log."""
        self.lab.wait_for(lambda: self.ended(job), limit, f"the end of job {job}")
        log = self.log(job, run)
        assert self.lab.job(job)["JobState"] == state, f"{self.lab.job(job)}\n{log}"
        return log

    def log(self, job: str, run: Path) -> str:
        """A job's log, and at its end what its ranks have written."""
        ranks = sorted((run / "slurm").glob(f"{job}.*/*rank*.log"))
        texts = [path.read_text(errors="replace")[-1500:] for path in ranks]
        main = run / "slurm" / f"{job}.log"
        return (main.read_text() if main.is_file() else "") + "\n=== ranks\n" + "\n".join(texts)

    def wait_for_step(self, job: str, run: Path, step: int, stage: str = "01-spatial", limit: float = 120) -> None:
        """Waits until a job has taken so many steps."""
        metrics = run / "stages" / stage / "metrics.jsonl"
        self.lab.wait_for(lambda: _last_step(metrics) >= step or self.ended(job), limit, f"step {step} in {metrics}")
        assert not self.ended(job), self.log(job, run)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _STORY:
        terminalreporter.section("jobs of Slurm: what the tests did, what the jobs said")
        for line in _STORY:
            terminalreporter.write_line(line)


def _process(run: Path, rank: int) -> int:
    sign = read_sign(RunFolder(run).heartbeats, rank)
    assert sign is not None
    return sign.process


def _last_step(metrics: Path) -> int:
    records = read_metrics(metrics)
    return records[-1]["step"] if records else 0


def final_state(run: Path, stage: str = "01-spatial") -> dict[str, Any]:
    """What two equal runs share to the bit: weights, every line of metrics but its speed."""
    folder = run / "stages" / stage
    weights = load_file(folder / "weights.safetensors")
    return {"weights": weights, "metrics": comparable_lines(folder / "metrics.jsonl")}


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = final_state(one), final_state(other)
    assert first["metrics"] == second["metrics"]
    assert first["weights"].keys() == second["weights"].keys()
    different = [name for name, tensor in first["weights"].items() if not torch.equal(tensor, second["weights"][name])]
    assert not different


@pytest.fixture(scope="session")
def lab() -> Iterator["Lab"]:
    from lab import Lab

    # Not pytest's own folder: the path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="omnivl-slurm-") as folder:
        running = Lab(Path(folder))
        yield running
        running.close()


@pytest.fixture
def cluster(lab: "Lab", tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    running = Cluster(lab, tmp_path)
    running.tell(f"-- {request.node.name}")
    yield running
    lab.run("scancel", "--signal=KILL", "--user", "root", "--full")
    lab.run("scancel", "--user", "root")
    lab.wait_for(lambda: lab.run("squeue", "-h").strip() == "", 60, "an empty queue")
    running.tell_jobs()
