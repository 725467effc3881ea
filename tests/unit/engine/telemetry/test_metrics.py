import json
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.hosts.base import StepResult
from engine.telemetry.loss_window import LossWindow
from engine.telemetry.metrics import MetricsLog, comparable, read_metrics


def test_records_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", None) as log:
        log.write(1, "train", loss=0.5, losses={"mlm": 0.5}, speed={"samples_per_second": 3.0})
        log.write(2, "evaluation", scores={"a/R@1": 1.0})
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert comparable(first) == {"step": 1, "event": "train", "loss": 0.5, "losses": {"mlm": 0.5}}
    assert first["speed"] == {"samples_per_second": 3.0}
    assert second["scores"] == {"a/R@1": 1.0}


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    with MetricsLog(file, None) as log:
        log.write(1, "train", loss=1.0)
        kept = log.size
        log.write(2, "train", loss=2.0)
    with file.open("ab") as torn:
        torn.write(b'{"step": 3, "eve')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]
    with MetricsLog(file, None, keep_bytes=kept, step=1) as log:
        log.write(2, "train", loss=2.5)
    assert [(record["step"], record["loss"]) for record in read_metrics(file)] == [(1, 1.0), (2, 2.5)]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", None) as log:
        log.write(1, "train", loss=math.nan, losses={"mlm": math.inf})
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: f"no JSON: {name}") == {
        "step": 1,
        "event": "train",
        "loss": None,
        "losses": {"mlm": None},
    }


def test_tensorboard_has_the_same_figures(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb") as log:
        log.write(4, "train", loss=0.5, losses={"mlm": 0.25}, skipped=0)
        log.write(4, "evaluation", scores={"R@1": 0.75})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "loss": [(4, 0.5)],
        "losses/mlm": [(4, 0.25)],
        "skipped": [(4, 0.0)],
        "evaluation/scores/R@1": [(4, 0.75)],
    }


def result(loss: float, losses: dict[str, float], skipped: bool = False) -> StepResult:
    return StepResult(loss, losses, {"mlm/accuracy": 2 * loss}, 3.0, {"decay": 0.1}, skipped)


def test_window_means_over_the_steps_in_which_an_objective_was_active() -> None:
    window = LossWindow()
    window.add(result(1.0, {"mlm": 1.0}))
    window.add(result(math.nan, {"mlm": math.nan}, skipped=True))
    window.add(result(3.0, {"mlm": 2.0, "vlm": 5.0}))
    # loss (1 + 3) / 2; mlm (1 + 2) / 2; vlm 5 / 1; accuracy (2 + 6) / 2
    assert window.take() == {
        "loss": 2.0,
        "gradient_norm": 3.0,
        "losses": {"mlm": 1.5, "vlm": 5.0},
        "metrics": {"mlm/accuracy": 4.0},
    }
    assert window.take() == {}


def test_window_goes_on_from_its_state() -> None:
    steps = [result(loss, {"mlm": loss / 3}) for loss in (0.1, 0.7, 1e-9, 12.3)]
    whole, first = LossWindow(), LossWindow()
    for step in steps[:2]:
        whole.add(step)
        first.add(step)
    second = LossWindow(json.loads(json.dumps(first.state())))
    for step in steps[2:]:
        whole.add(step)
        second.add(step)
    assert second.take() == whole.take()
