"""Points of a curve: as lines of a file, and in words."""

import json
from pathlib import Path

import pytest

from engine.errors import RunFileError
from engine.telemetry.curve import CurvePoint, curve_text, leading_names, read_curve, sparkline
from engine.telemetry.metrics import MetricsLog

NAME = "unseen/image->text R@1"


def point(step: int, score: float) -> CurvePoint:
    return CurvePoint(
        step=step,
        seconds=60.0,
        cost=1.5,
        scores={NAME: score, "unseen/image->text R@5": 0.5},
        chance={NAME: 0.01},
        pixels={NAME: 0.2},
        queries={NAME: 1400},
    )


def test_points_come_back_from_their_file_without_a_line_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "curve.jsonl"
    points = [point(0, 0.0), point(7, 0.25)]
    with MetricsLog(file, None) as log:
        for one in points:
            log.write(one.step, "curve", **one.groups)
    with file.open("ab") as torn:
        torn.write(b'{"step": 9, "ev')
    assert read_curve(file) == points
    assert read_curve(tmp_path / "missing.jsonl") == []
    assert json.loads(file.read_text().splitlines()[1])["speed"] == {"seconds": 60.0, "cost_seconds": 1.5}


@pytest.mark.parametrize("change", [{"scores": {NAME: "high"}}, {"scores": 1}, {"speed": {}}, {"step": None}])
def test_a_line_that_is_no_point_names_its_file_and_the_remedy(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "curve.jsonl"
    file.write_text(json.dumps({"step": 1, "event": "curve", **point(1, 0.5).groups, **change}) + "\n")
    with pytest.raises(RunFileError, match=r"curve\.jsonl: got a line that is no point .*; remove the file: the curve"):
        read_curve(file)


def test_the_newest_point_in_words() -> None:
    points = [point(0, 0.0), point(5, 0.02), point(9, 0.04)]
    said = f"{NAME} 0.040, 4.0 x chance, pixels 0.200 (1,400 queries)"
    assert curve_text(points, 0.0234, bars=True) == f"{said}  ▁▅█  2.3 % of the time"
    assert curve_text(points, None, bars=False) == said
    bare = CurvePoint(step=1, seconds=1.0, cost=1.0, scores={"labels/accuracy": 0.5, "labels/other": 1.0})
    assert curve_text([bare], None, bars=True) == "labels/accuracy 0.500"
    assert leading_names([bare, *points]) == ["labels/accuracy", NAME]


def test_bars_reach_from_zero_to_the_largest_value() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 100)) == 24
