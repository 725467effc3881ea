"""The top of the page: state, leading scores, contents; and figures that are told instead of drawn."""

import json
import re
from pathlib import Path

from report_pages import elements, outside_plotly, train_line

from engine.report import write_report


def test_the_summary_comes_first_and_leads_to_everything(run: Path) -> None:
    stages = [{"name": "spatial", "steps": 5}, {"name": "joint", "steps": 7}]
    (run / "plan.yaml").write_text(json.dumps({"name": "demo", "stages": stages}))
    speed = {"samples_per_second": 100.0, "seconds_per_step": 30.0, "cpu_seconds_per_step": 55.0}
    lines = [train_line(1, loss=4.0, speed=speed), train_line(4, loss=2.5, speed=speed, skipped=1)]
    stage = run / "stages" / "01-spatial"
    stage.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = json.dumps({"cause": "broken_image", "where": "a", "detail": "b"}) + "\n"
    stage.joinpath("quarantine.jsonl").write_text(2 * bad)
    page = outside_plotly(write_report(run).read_text())
    summary = page[page.index('<section id="summary">') : page.index("</section>")]
    assert page.index("<h1>") < page.index(summary) < page.index("<h2")
    rows = re.findall(r"<tr>(.*?)</tr>", summary)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]
    assert cells == [
        [
            "1",
            "spatial",
            "step 4 of 5",
            "2 min 00 s",
            "3 min 40 s",
            "4.000 to 2.500",
            "100.0",
            "1 skipped step, 2 bad samples",
        ],
        ["2", "joint", "not begun", "", "", "", "", ""],
    ]
    assert "Not complete: 0 of 2 stages done." in summary
    assert "unseen style, image-&gt;text R@1 <b>0.432</b> (chance 0.0006); captions, BLEU-4 <b>0.136</b>." in summary
    targets = [one["href"] for one in elements(summary, "a")]
    assert targets == ["#scores-1", "#stage-1", "#plan"]
    ids = [one["id"] for one in elements(page) if "id" in one]
    assert all(ids.count(target.removeprefix("#")) == 1 for target in targets)


def test_a_complete_run_says_so_and_a_failed_one_why(run: Path) -> None:
    (run / "plan.yaml").write_text(json.dumps({"name": "demo", "stages": [{"name": "spatial", "steps": 2}]}))
    (run / "failure.json").write_text(json.dumps({"code": 1, "said": "no <disk>", "rank": None}))
    assert "failed with exit code 1: no &lt;disk&gt;" in write_report(run).read_text()
    (run / "stages" / "01-spatial" / "complete.json").write_text('{"steps": 2}')
    page = write_report(run).read_text()
    assert "<b>Complete: 1 stage.</b>" in page
    assert "exit code 1" not in page


def test_figures_that_do_not_change_are_told_and_not_drawn(run: Path) -> None:
    metrics = run / "stages" / "01-spatial" / "metrics.jsonl"
    router = {f"router/dropped_{one}": 0.0 for one in ("image", "text")}
    lines = [
        train_line(step, loss=float(step), metrics={**router, "mlm/accuracy": 0.5}, losses={"mlm": step, "router/z": 0})
        for step in (1, 2, 3)
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = outside_plotly(write_report(run).read_text())
    told = re.search(r'<p class="flat">The same in every line of metrics: (.*?)\.</p>', page)
    assert told is not None
    flat = dict(re.findall(r"([^;]+?) <b>(.*?)</b>(?:; )?", told[1]))
    assert flat["Share of choices dropped, image"] == flat["Losses, router: z"] == "0"
    assert flat["Accuracy within the batch, MLM: accuracy"] == "0.5"
    titles = re.findall(r'"title":{"font":{"size":14},"text":"(.*?)"', page)
    assert titles == ["Losses"]
    assert re.findall(r'"name":"(.*?)"', page[: page.index('"text":"Losses"')]) == ["weighted total", "MLM"]
    scores = [{"event": "evaluation", "step": step, "scores": {"t/a R@1": 0.25, "t/b R@1": 0.5}} for step in (1, 2)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *scores]))
    page = write_report(run).read_text()
    assert "Scores while training" not in page
    assert "Score, t/a R@1 <b>0.25</b>; Score, t/b R@1 <b>0.5</b>" in page
