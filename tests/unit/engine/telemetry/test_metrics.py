import json
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.telemetry.metrics import MetricsLog, read_metrics


def test_records_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", None) as log:
        log.write(1, "train", loss=0.5, losses={"mlm": 0.5}, speed={"samples_per_second": 3.0})
        log.write(2, "evaluation", scores={"a/R@1": 1.0})
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert first == {
        **{"step": 1, "event": "train", "loss": 0.5, "losses": {"mlm": 0.5}},
        "speed": {"samples_per_second": 3.0},
    }
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
