"""Any process of a run may be killed at any moment: the others end, it is named, and the same command resumes exactly.

The full matrix is layouts x moments x (first, last rank). ``faults_page.py`` writes ``docs/faults.md`` from its run.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import patience
import pytest

from engine.watch.heartbeat import read_sign

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.timeout(300)]

TWO_STAGES = """
name: faults
seed: 5
model: {preset: MODEL, dropout: 0.1, drop_path: 0.1}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 2, keep_last: 2}
stages:
  - name: spatial
    steps: 5
    data: [{source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}]
    objectives: [mlm, {kind: univlc, queue_size: 24, batch_keys: momentum}]
    evaluate: {every: 3, tasks: [{kind: retrieval, where: {split: [test], style: [twemoji]}, max_samples: 12}]}
  - name: joint
    init_from: spatial
    steps: 2
    data:
      - {source: emoji, kind: image_text, where: {split: [train], style: [fluent]}}
      - {source: motion, kind: video_text}
    objectives: [mlm, univlc]
"""

LAYOUTS = {
    "plain": ("parallel.host=plain",),
    "zero3": ("parallel.host=zero", "parallel.zero_stage=3"),
    "pipeline": ("parallel.host=pipeline", "parallel.pipeline_stages=2", "parallel.zero_stage=1"),
}
MOMENTS = {
    "forward": ("spatial", 3),
    "backward": ("spatial", 3),
    "loading": ("spatial", 3),
    "evaluation": ("spatial", 3),
    "saving": ("spatial", 4),
    "writing": ("spatial", 4),
    "sealing": ("spatial", 4),
    "completing": ("spatial", 5),
    "starting": ("joint", 0),
}
"""When, and where the loop is then: the stage, and the optimizer steps taken."""

WORDS = {
    "forward": "in a forward pass",
    "backward": "in a backward pass",
    "loading": "waiting for data",
    "evaluation": "in an evaluation",
    "saving": "at the beginning of a save",
    "writing": "while a save writes",
    "sealing": "between manifest and rename",
    "completing": "at the end of a stage",
    "starting": "between stages",
}

QUICK = (("plain", "sealing", 0),)
WITHIN_SECONDS = 20.0
"""One, where the machine is not busy with other things."""

Reference = Callable[["Pretraining", str], list[dict[str, Any]]]


def cases() -> list[Any]:
    every = [(layout, moment, victim) for layout in LAYOUTS for moment in MOMENTS for victim in (0, 1)]
    return [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.full, id="-".join(map(str, case)))
        for case in every
    ]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """What a run under a layout leaves behind when nobody touches it."""
    kept: dict[str, list[dict[str, Any]]] = {}

    def run(pretraining: "Pretraining", layout: str) -> list[dict[str, Any]]:
        if layout not in kept:
            pretraining.run("whole", *LAYOUTS[layout])
            kept[layout] = states(pretraining, "whole")
        return kept[layout]

    return run


def states(pretraining: "Pretraining", name: str) -> list[dict[str, Any]]:
    return [pretraining.final_state(pretraining.stage(name, stage)) for stage in ("01-spatial", "02-joint")]


class Broken:
    """A run with a fault, as it ended."""

    def __init__(self, process: "subprocess.Popen[str]", record: Path) -> None:
        self.output, _ = patience.communicate(process, 120)
        ended = time.time()
        self.code, self.session = process.returncode, process.pid
        assert record.is_file(), f"the fault never happened:\n{self.output[-4000:]}"
        self.seconds = ended - json.loads(record.read_text())["time"]

    def left(self, seconds: float = 5.0) -> list[str]:
        """Processes of the run that are still there; those that help others take a moment to see that they are gone."""
        limit = patience.Limit(seconds)
        while (found := self._members()) and not limit.passed():
            time.sleep(0.05)
        return found

    def _members(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.session and state != "Z":
                    found.append(f"{folder.name} {state} {(folder / 'cmdline').read_text()}")
            except OSError:  # it has just ended
                continue
        return found


def break_run(
    pretraining: "Pretraining",
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    moment: str,
    victim: int,
    action: str,
    *arguments: str,
) -> Broken:
    stage, step = MOMENTS[moment]
    record = pretraining.folder / f"{name}.fault.json"
    fault = {"moment": moment, "stage": stage, "step": step, "victim": victim, "action": action}
    fault |= {"record": str(record), "run": str(pretraining.folder / name)}
    with monkeypatch.context() as patched:
        patched.setenv("OMNIVL_TEST_FAULT", json.dumps(fault))
        patched.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"), prepend=os.pathsep)
        return Broken(pretraining.start(name, *arguments), record)


@pytest.mark.parametrize(("layout", "moment", "victim"), cases())
def test_killed_at_any_moment(
    pretraining: "Pretraining",
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    layout: str,
    moment: str,
    victim: int,
) -> None:
    record_property("fault", f"{layout}, SIGKILL, {WORDS[moment]}")
    pretraining.write_plan(TWO_STAGES)
    whole = reference(pretraining, layout)
    broken = break_run(pretraining, monkeypatch, "killed", moment, victim, "kill", *LAYOUTS[layout])
    record_property("seconds", broken.seconds)
    assert f"rank {victim} was ended by SIGKILL" in broken.output
    assert "Traceback" not in broken.output, "the others only lost their company"
    assert broken.code == 128 + signal.SIGKILL
    assert broken.seconds < patience.seconds(WITHIN_SECONDS)
    assert broken.left() == []
    pretraining.run("killed", *LAYOUTS[layout])
    assert not pretraining.differences(whole, states(pretraining, "killed"))


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=pytest.mark.full) for layout in LAYOUTS])
def test_full_disk_during_a_save(
    pretraining: "Pretraining",
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    layout: str,
) -> None:
    """The last rank cannot write: the kernel refuses, as it does where there is no room."""
    record_property("fault", f"{layout}, full disk, {WORDS['saving']}")
    pretraining.write_plan(TWO_STAGES)
    whole = reference(pretraining, layout)
    broken = break_run(pretraining, monkeypatch, "full", "saving", 1, "fill", *LAYOUTS[layout])
    record_property("seconds", broken.seconds)
    assert broken.code == 2, broken.output[-4000:]
    assert "step-000004: could not be written (process 1: " in broken.output
    assert "File too large" in broken.output
    assert "step-000002 is left as it was. Make room or mend the disk" in broken.output
    assert "Traceback" not in broken.output
    assert broken.left() == []
    assert [path.name for path in (pretraining.stage("full") / "checkpoints").iterdir()] == ["step-000002"]
    pretraining.run("full", *LAYOUTS[layout])
    assert not pretraining.differences(whole, states(pretraining, "full"))


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=pytest.mark.full) for layout in LAYOUTS])
def test_flipped_byte_in_the_newest_checkpoint(
    pretraining: "Pretraining",
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    layout: str,
) -> None:
    record_property("fault", f"{layout}, SIGKILL and a flipped byte, {WORDS['completing']}")
    pretraining.write_plan(TWO_STAGES)
    whole = reference(pretraining, layout)
    broken = break_run(pretraining, monkeypatch, "flipped", "completing", 0, "kill", *LAYOUTS[layout])
    record_property("seconds", broken.seconds)
    newest = pretraining.stage("flipped") / "checkpoints" / "step-000005"
    file = max((newest / "host").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)
    output = pretraining.run("flipped", *LAYOUTS[layout])
    assert f"step-000005 is passed over: host/{file.name} does not have the SHA-256 that the manifest says" in output
    assert "going on after step 4" in output
    assert not pretraining.differences(whole, states(pretraining, "flipped"))


HANGS = {
    "stop": "gives no sign of life: it is stopped by a signal; last seen in ",
    "sleep": "hangs: stage spatial, after step 3 (",
    "hold": "gives no sign of life: it does not let Python run; last seen in ",
}


@pytest.mark.parametrize(
    ("action", "moment", "victim", "layout"),
    [
        ("stop", "backward", 0, "plain"),
        pytest.param("stop", "forward", 1, "zero3", marks=pytest.mark.full),
        pytest.param("stop", "evaluation", 1, "pipeline", marks=pytest.mark.full),
        pytest.param("sleep", "loading", 0, "plain", marks=pytest.mark.full),
        pytest.param("sleep", "evaluation", 1, "plain", marks=pytest.mark.full),
        pytest.param("sleep", "backward", 1, "pipeline", marks=pytest.mark.full),
        pytest.param("sleep", "forward", 0, "zero3", marks=pytest.mark.full),
        pytest.param("hold", "forward", 1, "plain", marks=pytest.mark.full),
    ],
)
def test_hung_rank_is_named(
    pretraining: "Pretraining",
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    action: str,
    moment: str,
    victim: int,
    layout: str,
) -> None:
    kinds = {"stop": "SIGSTOP", "sleep": "hangs in Python", "hold": "hangs in C"}
    record_property("fault", f"{layout}, {kinds[action]}, {WORDS[moment]}")
    pretraining.write_plan(TWO_STAGES)
    whole = reference(pretraining, layout)
    arguments = (*LAYOUTS[layout], "guard.hang_seconds=4")
    broken = break_run(pretraining, monkeypatch, "hung", moment, victim, action, *arguments)
    record_property("seconds", broken.seconds)
    assert broken.code == 75, broken.output[-4000:]
    assert "nothing has moved for 4 s, which is guard.hang_seconds\n" in broken.output
    assert f"\n  rank {victim} (process " in broken.output
    assert HANGS[action] in broken.output
    assert f"\n  waiting for it: rank {1 - victim}, stage spatial" in broken.output
    assert "Traceback" not in broken.output
    assert broken.seconds < patience.seconds(4 * 5), (
        "the limit, and the beats in which life is shown and traces are written"
    )
    assert broken.left() == []
    (hang,) = (pretraining.folder / "hung" / "hangs").iterdir()
    assert (hang / "verdict.txt").read_text().strip() in broken.output
    traces = [(hang / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    waits = {"zero3": "partition_parameters.py"}.get(layout, "distributed_c10d.py")
    assert waits in traces[1 - victim], "the other one waits in a collective"
    expected = {"stop": "It gave no sign of life.", "sleep": "sitecustomize.py", "hold": "sitecustomize.py"}
    assert expected[action] in traces[victim]
    pretraining.run("hung", *LAYOUTS[layout])
    assert not pretraining.differences(whole, states(pretraining, "hung"))


@pytest.mark.full
def test_slow_is_not_hung(pretraining: "Pretraining", monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that takes one process ten seconds, for which the other one waits, with a limit of three."""
    pretraining.write_plan(TWO_STAGES)
    arguments = (*LAYOUTS["plain"], "guard.hang_seconds=3")
    slow = break_run(pretraining, monkeypatch, "slow", "evaluation", 1, "work", *arguments)
    assert slow.code == 0, slow.output[-4000:]
    assert slow.seconds > 10
    assert "nothing has moved" not in slow.output
    signs = pretraining.folder / "slow" / "heartbeats"
    assert list(signs.glob("look-*")), "the other one looked, and saw that somebody works"
    assert all(sign is not None and sign.beat > 30 for sign in (read_sign(signs, rank) for rank in (0, 1)))
