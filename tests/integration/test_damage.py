"""Damaged files of a run: nothing is trained or read from them without a word, and none ends in a traceback."""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.disk.checkpoint import MANIFEST, find_fault, newest_complete
from engine.disk.saved import find_faults
from launcher.cli import app
from omnivl.errors import UserError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PLAN = f"""
name: damaged
model: {{preset: {ROOT / "configs" / "models" / "debug.yaml"}}}
parallel: {{host: plain, precision: fp32}}
launch: {{processes: 1}}
batch: {{micro_batch_size_per_gpu: 4}}
logging: {{every: 1, tensorboard: false}}
checkpoint: {{every: 2, keep_last: 2}}
stages:
  - name: first
    steps: 4
    data: [{{source: emoji, kind: image_text, where: {{split: [train], style: [fluent]}}}}]
    objectives: [univlc]
    evaluate: {{tasks: [{{kind: retrieval, where: {{split: [test], style: [twemoji]}}, max_samples: 8}}]}}
  - name: second
    init_from: first
    steps: 1
    data: [{{source: emoji, kind: image_text, where: {{split: [train], style: [fluent]}}}}]
    objectives: [univlc]
"""


def pretrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher.cli", "pretrain", str(folder.parent / "plan.yaml"), *arguments]
    command += ["--run-folder", str(folder)]
    return patience.run(command, capture_output=True, text=True, limit=300, env=environment)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two complete stages."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    (folder.parent / "plan.yaml").write_text(PLAN)
    done = pretrain(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@contextlib.contextmanager
def damaged(file: Path, damage: Callable[[bytes], bytes]) -> Iterator[bool]:
    """Within the block a file has another content; yields whether it really is another one."""
    content = file.read_bytes()
    other = damage(content)
    file.write_bytes(other)
    try:
        yield other != content
    finally:
        file.write_bytes(content)


def some_damage(draw: random.Random) -> Callable[[bytes], bytes]:
    """Flips one or two bits, cuts, empties, swaps, zeroes or lengthens a content."""

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)

    def swap(content: bytes) -> bytes:
        one, other = sorted((draw.randrange(len(content)), draw.randrange(len(content))))
        return content[:one] + content[other:] + content[one:other]

    def zero(content: bytes) -> bytes:
        begin = draw.randrange(len(content))
        return content[:begin] + bytes(len(content[begin : begin + 64])) + content[begin + 64 :]

    kinds = (flip, flip, flip, swap, zero, lambda content: content[: draw.randrange(len(content))], lambda _: b"")
    return draw.choice((*kinds, lambda content: content + b"\0"))


def manifest_of(checkpoint: Path) -> Any:
    return json.loads((checkpoint / MANIFEST).read_bytes())


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.full)])
def test_any_damage_to_a_checkpoint_is_found_and_the_one_before_is_taken(run: Path, count: int) -> None:
    """Half of the damages hit the manifest. A checkpoint may only pass if its manifest says the same as before."""
    draw, outcomes = random.Random(14), Counter[str]()
    checkpoints = run / "stages" / "01-first" / "checkpoints"
    earlier, newest = sorted(checkpoints.iterdir())
    files = [file for file in sorted(newest.rglob("*")) if file.is_file()]
    said = manifest_of(newest)
    for number in range(count):
        file = newest / MANIFEST if number % 2 else draw.choice(files)
        with damaged(file, some_damage(draw)) as changed:
            found = newest_complete(checkpoints, lambda _: None)
            verified = find_fault(newest)
            if found == newest:
                assert file.name == MANIFEST or not changed, f"damage {number} to {file} was not seen"
                assert manifest_of(newest) == said
            else:
                assert found == earlier
            assert (verified is None) == (found == newest)
            outcomes["found" if found == earlier else "harmless"] += 1
    assert outcomes["found"] > 0.9 * count, outcomes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda said: {**said, "files": {}}, "does not name trainer.json"),
        (lambda said: {**said, "files": {**said["files"], "../../../x": said["files"]["trainer.json"]}}, "is damaged"),
        (lambda said: {**said, "files": dict(list(said["files"].items())[1:])}, "does not name"),
        (lambda said: {**said, "files": {**said["files"], "trainer.json": {}}}, "is damaged"),
        (lambda said: {**said, "files": list(said["files"])}, "is damaged"),
        (lambda said: {**said, "step": 3}, "is of step 3"),
        (lambda said: {**said, "format": 4}, "has format 4"),
        (lambda said: {**said, "format": 2}, "is damaged"),
        (
            lambda said: {**said, "files": {**said["files"], "trainer.json": [{"bytes": -1, "sha256": ""}]}},
            "is damaged",
        ),
        (lambda said: {**said, "files": {**said["files"], "trainer.json": []}}, "is damaged"),
        (lambda said: [said], "it is no mapping"),
    ],
)
def test_a_manifest_that_says_too_little_is_not_whole(run: Path, change: Callable[[Any], Any], says: str) -> None:
    newest = max((run / "stages" / "01-first" / "checkpoints").iterdir())
    with damaged(newest / MANIFEST, lambda content: json.dumps(change(json.loads(content))).encode()):
        assert says in str(find_fault(newest))
        result = CliRunner().invoke(app, ["checkpoint", "verify", str(run)])
        assert result.exit_code == 1
        assert says in result.stdout
        with pytest.raises(UserError, match="damaged checkpoint"):
            raise_from("checkpoint", "convert", str(newest), "--out", str(run.parent / "out.safetensors"))
    assert find_fault(newest) is None


def raise_from(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.full)])
def test_any_damage_to_the_weights_of_a_stage_is_found(run: Path, count: int) -> None:
    draw = random.Random(33)
    file = run / "stages" / "01-first" / "weights.safetensors"
    assert find_faults(run)[file] is None
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for number in range(count):
        change = some_damage(draw)

        def in_header(content: bytes, change: Callable[[bytes], bytes] = change) -> bytes:
            return change(content[:header]) + content[header:]

        with damaged(file, in_header if number % 2 else change) as changed:
            assert (find_faults(file)[file] is not None) == changed, f"damage {number}"
    assert find_faults(file)[file] is None


def test_two_flipped_bits_in_the_weights_stop_whatever_reads_them(run: Path) -> None:
    file = run / "stages" / "01-first" / "weights.safetensors"

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 64
        changed[-5] ^= 1
        return bytes(changed)

    with damaged(file, flip):
        (run / "stages" / "02-second" / "complete.json").rename(run / "complete.json")
        try:
            done = pretrain(run)
        finally:
            (run / "complete.json").rename(run / "stages" / "02-second" / "complete.json")
        assert done.returncode == 2
        assert f"{file}: got a file" in done.stderr
        assert "does not have the SHA-256" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        result = CliRunner().invoke(app, ["checkpoint", "verify", str(run)])
        assert result.exit_code == 1
        assert f"{file}: it does not have the SHA-256" in result.stdout
        with pytest.raises(UserError, match="does not have the SHA-256"):
            raise_from("evaluate", str(run), "--stage", "first")


@pytest.mark.parametrize("takes", ["those of the other stage", "those of an earlier version"])
def test_other_weights_in_the_place_of_a_stage_s_are_found(run: Path, takes: str) -> None:
    """Whole weights, whose own hash is right or which have none."""
    file, other = (run / "stages" / stage / "weights.safetensors" for stage in ("01-first", "02-second"))
    plain = run.parent / "plain.safetensors"
    save_file(load_file(file), plain)
    taken = (other if takes.endswith("stage") else plain).read_bytes()
    assert find_faults(run)[file] is None
    with damaged(file, lambda _: taken) as changed:
        assert changed
        assert "another file than the one with which complete.json says" in str(find_faults(run)[file])
        with pytest.raises(UserError, match="that the stage was completed"):
            raise_from("evaluate", str(run), "--stage", "first")
    assert find_faults(run)[file] is None


SMALL_FILES = (
    *("plan.yaml", "environment.json", "report.html", "run.lock", "failure.json", "heartbeats/rank-00000.json"),
    *(f"stages/01-first/{name}" for name in ("metrics.jsonl", "evaluation.json", "complete.json", "unevaluated.json")),
    *(f"stages/02-second/{name}" for name in ("handover.json", "rollbacks.json", "complete.json", "quarantine.jsonl")),
)
ABSENT = {
    "failure.json": '{"code": 1, "said": "x", "rank": 0}',
    "stages/01-first/unevaluated.json": '{"4": "broken"}',
    "stages/02-second/rollbacks.json": '[{"first_bad": 1, "step": 1, "reason": "x", "loaders": []}]',
    "stages/02-second/quarantine.jsonl": '{"cause": "x", "where": "y", "detail": "z"}\n',
}
"""Contents of files that this run has no reason to have."""


@contextlib.contextmanager
def present(run: Path, name: str) -> Iterator[Path]:
    file = run / name
    absent = not file.exists()
    if absent:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ABSENT[name])
    try:
        yield file
    finally:
        if absent:
            file.unlink()


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_cut_run_files_end_no_command_in_a_traceback(run: Path, name: str, count: int) -> None:
    """What reads a finished run gives its result, or one error that names the file."""
    draw = random.Random(name)
    report = (run / "report.html").read_bytes()
    with present(run, name) as file:
        for _ in range(count):
            with damaged(file, some_damage(draw)):
                for command in (("report", str(run)), ("checkpoint", "verify", str(run))):
                    result = CliRunner().invoke(app, command)
                    if result.exception is not None and not isinstance(result.exception, SystemExit):
                        assert isinstance(result.exception, UserError), (name, file.read_bytes()[:300])
                        assert file.name in str(result.exception)
    (run / "report.html").write_bytes(report)


@pytest.mark.parametrize("cut", ["half", pytest.param("empty", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_run_with_a_cut_file_goes_on_or_says_which_file(run: Path, name: str, cut: str) -> None:
    keep = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with present(run, name) as file, damaged(file, lambda c: c[: len(c) // 2] if cut == "half" else b""):
        done = pretrain(run)
        assert "Traceback" not in done.stdout + done.stderr
        if done.returncode != 0:
            assert done.returncode == 2, done.stderr
            assert file.name in done.stderr
    for file, content in keep.items():
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.full)])
def test_whatever_lies_in_the_place_of_a_file_is_passed_over_or_named(run: Path, count: int) -> None:
    """Also folders, links, pipes, devices, files without the right to read them; half of the times a run goes on."""
    program = Path(__file__).with_name("replaced_files.py")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(run), "33", str(count)]
    done = patience.run(command, limit=60 + 3 * count, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout[done.stdout.index("[") :]) == []


def filled_disk(run: Path, kibibytes: int, plan: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Trains on a disk of this size, then, with room made, once more; returns the first start and the other's output.

    The disk is a file system in memory that only the started processes see; what it holds at the end is copied to
    ``run``.
    """
    disk = run.parent / f"disk-{kibibytes}"
    disk.mkdir(parents=True)
    train = f"{sys.executable} -m launcher.cli pretrain {plan} --run-folder {disk}/at/run"
    script = (
        f"mount -t tmpfs -o size={kibibytes}k tmpfs {disk} && {train}; code=$?; "
        f"mount -o remount,size=1g {disk} && {train} >{run}.log 2>&1 && cp -a {disk}/at/run {run}; exit $code"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = patience.run(
        ["unshare", "--mount", "sh", "-c", script], limit=300, capture_output=True, text=True, env=environment
    )
    return done, Path(f"{run}.log").read_text()


def may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"], check=False).returncode == 0
    except OSError:
        return False


KIBIBYTES = (2500, *(pytest.param(n, marks=pytest.mark.full) for n in (8, 16, 24, 60, 1100, 3500, 6400, 9400, 12500)))


@pytest.mark.parametrize("kibibytes", KIBIBYTES)
def test_a_full_disk_loses_nothing_and_is_called_by_its_name(run: Path, tmp_path: Path, kibibytes: int) -> None:
    """Room runs out at the plan, within a save of either stage, at the weights, at the page."""
    if not may_mount():
        pytest.skip("needs the right to mount a file system in memory")
    done, again = filled_disk(tmp_path / "run", kibibytes, run.parent / "plan.yaml")
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "could not be written" in said
    assert " room" in said
    assert "Traceback" not in said
    assert (tmp_path / "run").is_dir(), again
    for stage in ("01-first", "02-second"):
        written, whole = (
            load_file(folder / "stages" / stage / "weights.safetensors") for folder in (tmp_path / "run", run)
        )
        assert all(torch.equal(written[name], tensor) for name, tensor in whole.items())
