"""The curves of a run in its report: one chart over the steps of the run, with chance and the pixel baseline."""

import json
from pathlib import Path

from report_pages import outside_plotly

from engine.report import write_report
from engine.report.learning import StageCurve, learning_figure, learning_text
from engine.telemetry.curve import CurvePoint

NAME = "unseen/image->text R@1"


def points(*steps: int, pixels: float | None = 0.2) -> list[CurvePoint]:
    return [
        CurvePoint(
            step=step,
            seconds=step * 2.0,
            cost=1.0,
            scores={NAME: step / 1000, "unseen/image->text R@5": 0.5},
            chance={NAME: 0.01},
            pixels={} if pixels is None else {NAME: pixels},
            queries={NAME: 141},
        )
        for step in steps
    ]


def test_stages_follow_each_other_and_chance_and_pixels_lie_beside_the_score() -> None:
    curves = [StageCurve("one", 0, points(0, 40, 100)), StageCurve("two", 100, points(0, 50))]
    lines = {line.name.replace("&gt;", ">"): line for line in learning_figure(curves).data}
    assert list(lines) == [NAME, f"{NAME}, chance", f"{NAME}, 16x16 pixels"], "and no line for R@5"
    assert [tuple(line.x) for line in lines.values()] == [(0, 40, 100, 100, 150)] * 3
    assert tuple(lines[NAME].y) == (0.0, 0.04, 0.1, 0.0, 0.05)
    assert set(lines[f"{NAME}, chance"].y) == {0.01}
    assert set(lines[f"{NAME}, 16x16 pixels"].y) == {0.2}
    figure = learning_figure(curves)
    assert [(one.text, one.x) for one in figure.layout.annotations] == [("one", 0), ("two", 100)]
    assert [shape.x0 for shape in figure.layout.shapes] == [100]


def test_without_a_reference_there_is_no_line_of_pixels() -> None:
    figure = learning_figure([StageCurve("one", 0, points(0, 40, pixels=None))])
    assert len(figure.data) == 2


def test_the_cost_is_told() -> None:
    curves = [StageCurve("one", 0, points(0, 40, 100)), StageCurve("two", 100, points(0, 50))]
    assert learning_text(curves) == "5 evaluations of 141 queries in 5 s, 1.7 % of the time of training."
    assert learning_text([StageCurve("one", 0, points(0))]) == "1 evaluation of 141 queries in 1 s."


def test_the_page_shows_the_curve_of_a_run_behind_the_steps_of_earlier_stages(run: Path) -> None:
    assert "Scores by time" not in outside_plotly(write_report(run).read_text())
    stages = [{"name": name, "steps": steps} for name, steps in (("spatial", 70), ("later", 9))]
    (run / "plan.yaml").write_text(json.dumps({"name": "demo", "stages": stages}))
    later = run / "stages" / "02-later"
    later.mkdir()
    lines = [json.dumps({"step": one.step, "event": "curve", **one.groups}) for one in points(0, 9)]
    (later / "curve.jsonl").write_text("\n".join(lines) + "\n")
    page = outside_plotly(write_report(run).read_text())
    assert '<h2 id="curve">Scores by time</h2>' in page
    assert '<a href="#curve">' in page
    assert "2 evaluations of 141 queries in 2 s" in page
    assert '"x":[70,79]' in page.replace(" ", "")
    (later / "curve.jsonl").write_text('{"step": 1, "event": "curve"}\n')
    page = outside_plotly(write_report(run).read_text())
    assert "Scores by time" not in page
    assert "stages/02-later/curve.jsonl: got a line that is no point of a curve" in page
