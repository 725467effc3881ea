"""What may change in a run that has begun, row by row of the table in docs/plan.md."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from engine.disk.run_folder import RunFolder, RunFolderError
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.run.amendment import consequences, record, take_over

TEXT = """
name: amended
model: {preset: tiny}
parallel: {host: plain, precision: fp32}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 4}
stages:
  - name: one
    steps: 10
    data:
      - {source: emoji, kind: image_text}
      - {source: motion, kind: video_text, weight: 2}
    objectives: [mlm, {kind: univlc, queue_size: 24}]
    optimizer: {lr: 1e-3, warmup_steps: 2}
  - name: two
    steps: 10
    init_from: one
    data: [{source: emoji, kind: image_text}]
    objectives: [mlm]
"""


def plan(*overrides: str) -> Plan:
    return parse_plan(TEXT, overrides=overrides)


def run_at(path: Path, one: int | None, two: int | None = None, *, complete: tuple[str, ...] = ()) -> RunFolder:
    """A run whose stages have saved that many steps."""
    run = RunFolder(path / "run")
    for index, (name, taken) in enumerate((("one", one), ("two", two))):
        folder = run.stage(index, name)
        if taken is not None:
            (folder.checkpoints / f"step-{taken:06d}").mkdir(parents=True)
        if name in complete:
            assert taken is not None
            folder.mark_complete(taken)
    return run


def fields(run: RunFolder, *overrides: str, amend: bool = True, kept: int | None = None) -> list[str]:
    return [field for field, _, _ in take_over(run, plan(), plan(*overrides), amend=amend, kept=kept)]


RUNNING = (
    "stages.one.steps=20",
    "stages.one.steps=7",
    "stages.one.optimizer.lr=1e-4",
    "stages.one.optimizer.schedule=constant",
    "stages.one.optimizer.warmup_steps=5",
    "stages.one.optimizer.final_lr_ratio=0.1",
    "stages.one.optimizer.weight_decay=0.1",
    "stages.one.optimizer.eps=1e-6",
    "stages.one.optimizer.gradient_clipping=0.5",
    "stages.one.optimizer.layer_decay=0.9",
    "stages.one.objectives.univlc.weight=2",
    "stages.one.objectives.mlm.weight_warmup_steps=3",
    "stages.one.data.0.weight=3",
    "stages.one.data.0.augment.flip=0",
    "stages.one.data.0.caption=random",
    "stages.one.data.1.frames.mode=uniform",
    "parallel.precision=bf16",
    "loader.max_pixels=1000000",
)


@pytest.mark.parametrize("override", RUNNING)
def test_what_may_change_in_a_running_stage_needs_to_be_asked_for(tmp_path: Path, override: str) -> None:
    run = run_at(tmp_path, 6)
    assert fields(run, override), "the change is told"
    with pytest.raises(RunFolderError, match=r"holds a run of another plan:[\s\S]+the same command with --amend\.$"):
        fields(run, override, amend=False)


FIXED = {
    "seed=1": "it holds for the whole run",
    "tokenizer=vocab.txt": "it holds for the whole run",
    "model.num_frames=2": "fixed when stage one began",
    "stages.one.optimizer.betas=[0.9, 0.95]": "fixed when stage one began",
    "stages.one.optimizer.kind=muon": "fixed when stage one began",
    "stages.one.freeze=[embed]": "fixed when stage one began",
    "stages.one.data.0.where={split: [train]}": "fixed when stage one began",
    "stages.one.data.0.source=questions": "fixed when stage one began",
    "stages.one.data.0.weight=0": "an entry cannot come or go",
    "stages.one.objectives.univlc.queue_size=32": "fixed when stage one began",
    "stages.one.objectives=[mlm]": "fixed when stage one began",
    "stages.one.steps=6": "6 steps are taken; give 7 or more",
}


@pytest.mark.parametrize("override", FIXED)
def test_what_a_running_stage_cannot_change(tmp_path: Path, override: str) -> None:
    run, before, overrides = run_at(tmp_path, 6), plan(), (override,)
    if override.startswith("tokenizer"):  # a file that need not be there
        before, overrides = replace(before, tokenizer="vocab.txt"), ()
    with pytest.raises(RunFolderError) as caught:
        take_over(run, before, plan(*overrides), amend=True)
    assert "--amend does not change these fields of a run:\n" in str(caught.value)
    assert FIXED[override] in str(caught.value)


FREE = (
    "name=other",
    "checkpoint.keep_last=5",
    "checkpoint.every=7",
    "logging.every=1",
    "guard.rollbacks=3",
    "loader.num_workers=1",
    "launch.processes=2",
    "parallel.host=zero",
    "batch.micro_batch_size_per_gpu=8",
    "batch.gradient_accumulation_steps=2",
    "stages.one.evaluate.every=5",
)


@pytest.mark.parametrize("override", FREE)
def test_what_is_free_needs_not_be_asked_for(tmp_path: Path, override: str) -> None:
    assert fields(run_at(tmp_path, 6), override, amend=False) == []


def test_anything_may_change_in_a_stage_that_has_not_begun(tmp_path: Path) -> None:
    run = run_at(tmp_path, 6)
    changed = (
        *("stages.two.steps=3", "stages.two.objectives=[mlm, lm]", "stages.two.init_from=null"),
        *("stages.two.data.0.where={split: [train]}", "stages.two.model={num_frames: 2}", "stages.two.freeze=[embed]"),
        *("stages.two.optimizer.betas=[0.9, 0.95]", "stages.two.optimizer.kind=muon", "stages.two.name=third"),
    )
    found = fields(run, *changed)
    assert len(found) >= len(changed)
    assert all(field.startswith("stages.1.") for field in found)


def test_a_field_of_all_stages_is_refused_for_the_one_that_has_begun(tmp_path: Path) -> None:
    """``model`` stands once for all stages; it is compared stage by stage."""
    with pytest.raises(RunFolderError) as caught:
        fields(run_at(tmp_path, 6), "model.num_frames=2")
    assert "stages.0.model.num_frames" in str(caught.value)
    assert "stages.1.model.num_frames" not in str(caught.value)


def test_a_stage_after_which_another_has_begun_stays_as_it_was(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, 4, complete=("one",))
    for override in ("stages.one.steps=20", "stages.one.optimizer.lr=1e-4"):
        with pytest.raises(RunFolderError, match="a stage after one has begun"):
            fields(run, override)
    assert fields(run, "stages.two.optimizer.lr=1e-5") == ["stages.1.optimizer.lr"]


def test_a_complete_stage_changes_only_with_more_steps(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, complete=("one",))
    with pytest.raises(RunFolderError, match="stage one is complete, no step is left that it would act on"):
        fields(run, "stages.one.optimizer.lr=1e-4")
    with pytest.raises(RunFolderError, match="10 steps are taken; give 11 or more"):
        fields(run, "stages.one.steps=8")
    assert fields(run, "stages.one.optimizer.lr=1e-4", "stages.one.steps=20") == [
        "stages.0.steps",
        "stages.0.optimizer.lr",
    ]


def test_deleting_later_stages_does_not_change_earlier_ones(tmp_path: Path) -> None:
    """``--fresh --stage two``: stage two may be any other, stage one has to be the one that was trained."""
    run = run_at(tmp_path, 10, 4, complete=("one",))
    assert fields(run, "stages.two.optimizer.lr=1e-5", "stages.two.objectives=[lm]", amend=False, kept=1) == []
    with pytest.raises(RunFolderError, match=r"stages\.0\.optimizer\.lr: was 0\.001, is now 0\.0001"):
        fields(run, "stages.one.optimizer.lr=1e-4", amend=False, kept=1)


def cosine(step: int, steps: int, warmup: int = 2) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_a_longer_cosine_is_planned_anew_and_its_rates_are_told(tmp_path: Path) -> None:
    run = run_at(tmp_path, 6)
    (message,) = consequences(run, plan(), plan("stages.one.steps=20"))
    assert message == (
        "stage one: amended after step 6: 14 steps are left of 20 (were 10); learning rate of the next step "
        f"{1e-3 * cosine(6, 20):.3g} (by the earlier plan {1e-3 * cosine(6, 10):.3g}), of the last "
        f"{1e-3 * cosine(19, 20):.3g}"
    )
    assert "next step 0.000883 (by the earlier plan 0.0005), of the last 7.6e-06" in message


def test_a_cosine_that_is_stretched_at_its_end_is_warned_of(tmp_path: Path) -> None:
    """Two more steps after ten: (cos 12 of 12 - 2) leaves 9.5 % and 2.4 % of the peak."""
    run = run_at(tmp_path, 10, complete=("one",))
    first, warning = consequences(run, plan(), plan("stages.one.steps=12"))
    share = (cosine(10, 12) + cosine(11, 12)) / 2
    assert "2 steps are left of 12 (were 10); learning rate of the next step 9.55e-05 (by the earlier plan 0)" in first
    assert f"warning: the steps that are left have {share:.1%} of optimizer.lr on average" in warning
    assert f"{share:.1%}" == "6.0%"
    constant = plan("stages.one.steps=12", "stages.one.optimizer.schedule=constant", "stages.one.optimizer.lr=1e-5")
    (only,) = consequences(run, plan(), constant)
    assert "learning rate of the next step 1e-05 (by the earlier plan 0), of the last 1e-05" in only


def test_nothing_is_said_where_nothing_changed_or_nothing_is_left(tmp_path: Path) -> None:
    run = run_at(tmp_path, 10, complete=("one",))
    assert list(consequences(run, plan(), plan())) == []
    assert list(consequences(run, plan(), plan("stages.two.optimizer.lr=1e-5"))) == []


def test_changes_are_recorded_with_the_step(tmp_path: Path) -> None:
    run = run_at(tmp_path, 6)
    for value in ("1e-4", "2e-4"):
        now = plan(f"stages.one.optimizer.lr={value}")
        record(run, take_over(run, plan(), now, amend=True), now)
    record(run, [], plan())
    first, second = json.loads(run.amendments.read_text())
    assert first["steps"] == second["steps"] == {"one": 6}
    assert second["changes"] == [{"field": "stages.0.optimizer.lr", "before": 1e-3, "now": 2e-4}]
