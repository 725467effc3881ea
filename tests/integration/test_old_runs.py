"""Runs of version 0.1.0 (``old_runs/make.py``) are read by the present code.

A finished run is evaluated, exported, reported and recognised as finished; one that was stopped under ZeRO-3 resumes to
its end, on its layout and on one process. Results equal those of version 0.1.0, but for the steps after the stop, which
were recorded when losses became means over all micro-batches of a step: to the bit on a machine like that one, within
the golden runs' limits on another.
"""

import json
from pathlib import Path

import pytest
from golden.runs import command_line, deviations, fingerprint, first_difference, read_record, read_recorded, too_far
from integration.old_runs.make import HERE, exported, scores, unpack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("finished", tmp_path_factory.mktemp("elsewhere") / "moved")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for the tests that only look at it."""
    return unpack("stopped", tmp_path_factory.mktemp("stopped"))


def test_a_finished_run_is_evaluated_as_it_was_and_shown(finished: Path) -> None:
    known = read_recorded(HERE / "finished.json")
    # A rank may change place where two candidates are as good: one of 60 samples on another machine.
    tolerance = 0.0 if known["machine"] == fingerprint() else 0.02
    found = scores(finished)  # figures that came later, such as median ranks, are beside those on record
    same = {name: found[name] for name in known["scores"]}
    assert same == pytest.approx(known["scores"], abs=tolerance, rel=1e-3 if tolerance else 0)
    assert "report: " in command_line(["report", str(finished)], finished.parent)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("spatial", "joint", "image-&gt;text R@5", "labels"))


def test_a_finished_run_is_exported_as_it_was(finished: Path, tmp_path: Path) -> None:
    known, found = read_recorded(HERE / "finished.json"), exported(finished, tmp_path)
    assert found["embeddings"].keys() == known["embeddings"].keys()
    for name, rows in known["embeddings"].items():
        ours = [value for row in found["embeddings"][name] for value in (row if isinstance(row, list) else [row])]
        theirs = [value for row in rows for value in (row if isinstance(row, list) else [row])]
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    assert found["captions"] == known["captions"]


def test_a_finished_run_is_not_done_again(finished: Path) -> None:
    weights = finished / "stages" / "02-joint" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    told = command_line(["pretrain", str(finished / "plan.yaml"), "--run-folder", str(finished)], finished.parent)
    assert "stage spatial: complete" in told and "stage joint: complete" in told
    assert weights.stat().st_mtime_ns == before


@pytest.mark.distributed
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """On two processes under ZeRO-3, as it was: losses, norms and weights are those on record."""
    run, expected = unpack("stopped", tmp_path), read_recorded(HERE / "stopped.json")
    done = _steps_done(run)
    told = command_line(["pretrain", str(run / "plan.yaml"), "--run-folder", "stopped"], tmp_path)
    assert "stage spatial: complete" in told and f"going on after step {done}" in told
    got = read_record(run / "stages" / "02-joint")
    alike = expected["machine"] == fingerprint()
    beyond = too_far(deviations(got, expected), to_the_bit=alike)
    assert not beyond, f"{'; '.join(beyond[:8])}. {first_difference(got, expected)}"


def test_a_stopped_run_goes_on_with_another_layout(tmp_path: Path) -> None:
    """On one process without DeepSpeed, from the same samples: rounding apart it learns the same."""
    run, expected = unpack("stopped", tmp_path), read_recorded(HERE / "stopped.json")
    done = _steps_done(run)
    alone = ("parallel.host=plain", "launch.processes=1", "batch.micro_batch_size_per_gpu=4")
    told = command_line(["pretrain", str(run / "plan.yaml"), *alone, "--run-folder", "stopped"], tmp_path)
    assert f"step-{done:06d} was written by zero-3 on 2 processes" in told
    got = read_record(run / "stages" / "02-joint")
    assert got["figures"].keys() == expected["figures"].keys()
    losses = [name for name in expected["figures"] if name.startswith("loss")]
    assert "losses: univlc" in losses and "losses: lm" in losses
    for name in losses:
        ours, theirs = got["figures"][name], expected["figures"][name]
        assert ours[:done] == theirs[:done], "what was written before the stop"
        assert [value is None for value in ours] == [value is None for value in theirs], name
        pairs = [(one, other) for one, other in zip(ours[done:], theirs[done:], strict=True) if other is not None]
        assert [one for one, _ in pairs] == pytest.approx([other for _, other in pairs], rel=1e-4), name
    assert got["tensors"].keys() == expected["tensors"].keys()


def test_a_stopped_run_is_shown(stopped: Path) -> None:
    assert "report: " in command_line(["report", str(stopped)], stopped.parent)
    assert "joint" in (stopped / "report.html").read_text(encoding="utf-8")


def _steps_done(run: Path) -> int:
    """Steps of the second stage that the stopped run had taken; some were left."""
    stage = run / "stages" / "02-joint"
    (checkpoint,) = (stage / "checkpoints").iterdir()
    done = int(json.loads((checkpoint / "trainer.json").read_text())["step"])
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == done < 16, "metrics end where the checkpoint was taken"
    return done
