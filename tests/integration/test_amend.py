"""A run that is changed on its way: the rates of every step by hand, and every bit where nothing changes."""

import json
import math
import re
from typing import TYPE_CHECKING

import pytest
import yaml

from engine.telemetry.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

STAGE = "stages.spatial"
SHORT = ("logging.every=1", f"{STAGE}.steps=4", "checkpoint.every=2")


def rates(pretraining: "Pretraining", name: str) -> list[float]:
    """The learning rate of each step, of groups without a factor."""
    lines = read_metrics(pretraining.stage(name) / "metrics.jsonl")
    return [line["lr"]["decay"] for line in lines if line["event"] == "train"]


def cosine(lr: float, step: int, steps: int, warmup: int = 2) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_a_complete_cosine_goes_on_as_the_longer_plan_has_it(pretraining: "Pretraining") -> None:
    """Refused without --amend; with it the rates are told, and the run folder alone is enough from then on."""
    pretraining.run("run", *SHORT)
    assert rates(pretraining, "run") == pytest.approx([cosine(1e-3, step, 4) for step in range(4)])
    longer = ("logging.every=1", f"{STAGE}.steps=8", f"{STAGE}.optimizer.lr=5e-4", "checkpoint.every=2")
    refused = pretraining.run("run", *longer, code=2)
    assert "stages.0.steps: was 4, is now 8\n  stages.0.optimizer.lr: was 0.001, is now 0.0005\n" in refused
    assert "Or take these changes over: the same command with --amend." in refused
    output = pretraining.run("run", *longer, "--amend")
    told = f"learning rate of the next step {cosine(5e-4, 4, 8):.3g} (by the earlier plan 0)"
    assert told in " ".join(output.split())
    assert "warning: the steps that are left" not in output
    expected = [*(cosine(1e-3, step, 4) for step in range(4)), *(cosine(5e-4, step, 8) for step in range(4, 8))]
    assert rates(pretraining, "run") == pytest.approx(expected)

    folder = pretraining.folder / "run"
    (entry,) = json.loads((folder / "amendments.json").read_text())
    assert entry["steps"] == {"spatial": 4}
    assert yaml.safe_load((folder / "plan.yaml").read_text())["stages"][0]["steps"] == 8
    pretraining.plan = folder  # its plan has the overrides
    assert "stage spatial: complete" in pretraining.run("run")


@pytest.mark.full
def test_an_amended_run_equals_one_that_was_so_from_the_beginning(pretraining: "Pretraining") -> None:
    """What acts on later steps only leaves no other trace: to the bit, and without a change nothing is amended."""
    ended = (*SHORT, f"{STAGE}.optimizer.schedule=constant")
    pretraining.run("whole", *ended, f"{STAGE}.steps=6")
    pretraining.run("amended", *ended)
    output = pretraining.run("amended", *ended, f"{STAGE}.steps=6", "--amend")
    assert "amended after step 4: 2 steps are left of 6 (were 4); learning rate of the next step 0.001" in output
    whole, amended = (pretraining.final_state(pretraining.stage(name)) for name in ("whole", "amended"))
    assert not pretraining.differences(whole, amended)
    again = pretraining.run("amended", *ended, f"{STAGE}.steps=6", "--amend")
    assert "amended after" not in again
    assert len(json.loads((pretraining.folder / "amended" / "amendments.json").read_text())) == 1


@pytest.mark.full
def test_every_other_change_of_a_running_stage_is_taken(pretraining: "Pretraining") -> None:
    """Fewer steps, precision, mixture, weights of objectives and groups of the optimizer at once."""
    pretraining.run("run", "logging.every=1", f"{STAGE}.steps=4", "checkpoint.every=2")
    changed = (
        *("logging.every=1", "checkpoint.every=2", f"{STAGE}.steps=7", "parallel.precision=bf16"),
        *(f"{STAGE}.data.0.weight=3", f"{STAGE}.data.0.augment.flip=0", f"{STAGE}.objectives.mlm.weight=0.5"),
        *(f"{STAGE}.optimizer.layer_decay=0.5", f"{STAGE}.optimizer.weight_decay=0", f"{STAGE}.optimizer.lr=1e-4"),
    )
    assert "amended after step 4" in pretraining.run("run", *changed, "--amend")
    lines = [line for line in read_metrics(pretraining.stage("run") / "metrics.jsonl") if line["event"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[-1]["lr"]["decay"] == pytest.approx(cosine(1e-4, 6, 7))
    assert min(lines[-1]["lr"].values()) < lines[-1]["lr"]["decay"], "layers have factors now"


@pytest.mark.full
def test_a_resumed_run_keeps_the_steps_of_its_epochs(pretraining: "Pretraining") -> None:
    """A hundredth of an epoch on 4 samples a step; with 2 it goes on with as many steps."""
    text = (
        pretraining.plan.read_text().replace("steps: 10", "epochs: 0.01").replace("warmup_steps: 2", "warmup_steps: 99")
    )
    pretraining.plan.write_text(text)
    output = " ".join(pretraining.run("run", "batch.micro_batch_size_per_gpu=2").split())
    told = re.search(
        r"0.01 epochs of image_text:emoji \(([\d,]+) samples, 50% of the mixture\): (\d+) steps of 4", output
    )
    assert told is not None, output
    samples, steps = int(told[1].replace(",", "")), int(told[2])
    assert steps == math.ceil(0.01 * samples / (4 * 0.5))
    assert f"warmup_steps: 99 are more than the stage's {steps} steps" in output
    saved = yaml.safe_load((pretraining.folder / "run" / "plan.yaml").read_text())["stages"][0]
    assert (saved["steps"], saved["epochs"]) == (steps, None)
    again = " ".join(pretraining.run("run", "batch.micro_batch_size_per_gpu=1").split())
    assert f"it goes on with the {steps} steps that it began with (--amend changes them)" in again
    assert "stage spatial: complete" in again
