"""The page of a run: it shows the content of the files, and loads nothing over the network."""

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from engine.report import write_report
from engine.report.curves import evaluation_records, panels_of, smooth, training_records
from engine.report.stage_files import count_parts, flat_facts, quarantine_counts
from engine.report.table import format_share
from engine.telemetry.panels import PANELS

SCORES: list[dict[str, Any]] = [
    {"task": "unseen style", "metric": "image->text R@1", "value": 0.4321, "chance": 0.00062, "baseline": 0.216},
    {"task": "unseen style", "metric": "image->text R@10", "value": 0.8765, "chance": 0.0062, "baseline": 0.453},
    {"task": "captions", "metric": "BLEU-4", "value": 0.1357, "chance": None, "baseline": None},
]
IMAGE = "data:image/png;base64,AAAA"


def train_line(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "event": "train",
        "step": step,
        "loss": 3.5,
        "gradient_norm": 1.25,
        "skipped": 0,
        "losses": {"mlm": 2.5, "univlc": 1.0},
        "lr": {"decay": 0.001},
        "metrics": {"mlm/accuracy": 0.5, "univlc/temperature": 0.07, "univlc/new_figure": 9.0},
        "speed": {"samples_per_second": 100.0, "mfu": 0.3, "data_wait": 0.01, "save_seconds": 0.0, "memory_gib": 1.0},
        **changed,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere"
    stage = folder / "stages" / "01-spatial"
    stage.mkdir(parents=True)
    (folder / "plan.yaml").write_text("name: demo\nstages: [<b>]\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "gpu": "", "git": {"commit": "abc123"}}))
    lines = [train_line(1), train_line(2, skipped=1, gradient_norm=None)]
    lines += [{"event": "evaluation", "step": step, "scores": {"t/text->image R@1": step / 10}} for step in (1, 2)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut sh')
    first = {"query_text": "a cat", "query_image": IMAGE, "answer_texts": ["a dog", "a cat"], "answer_images": ["", ""]}
    second = {"query_text": "bee", "query_image": IMAGE, "answer_texts": ["<script>"], "answer_images": [""]}
    galleries = [
        {"title": "pictures to texts", "rows": [{**first, "correct": [False, True]}]},
        {"title": "written captions", "rows": [{**second, "correct": [False]}]},
    ]
    scores = [{**score, "count": 1599} for score in SCORES]
    results = [{"scores": scores[:2], "galleries": galleries[:1]}, {"scores": scores[2:], "galleries": galleries[1:]}]
    (stage / "evaluation.json").write_text(json.dumps({"step": 2, "results": results}))
    handover = {"source": "warm-up", "carried": ["visual_00.a", "visual_01.a", "text_00.b"], "created": ["losses.x"]}
    (stage / "handover.json").write_text(json.dumps(handover))
    return folder


def outside_plotly(page: str) -> str:
    """The page without Plotly's own code, which holds addresses that are never asked for here."""
    assert get_plotlyjs() in page
    return page.replace(get_plotlyjs(), "")


def elements(page: str, tag: str | None = None) -> list[dict[str, str]]:
    """The attributes of every element (of a kind) of a page, as a browser would find them."""
    found: list[dict[str, str]] = []

    class Collector(HTMLParser):
        def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag in (None, name):
                found.append({"": name, **{attribute: value or "" for attribute, value in attrs}})

    Collector().feed(page)
    return found


def test_every_score_stands_on_the_page_with_chance_and_baseline(run: Path) -> None:
    page = outside_plotly(write_report(run).read_text())
    for score in SCORES:
        cells = f">{html.escape(score['metric'])}<.*?<b>{format_share(score['value'])}</b>.*?{format_share(score['chance'])}</td>.*?{format_share(score['baseline'])}</td>.*?1599</td>"  # noqa: E501 - one row of the table
        assert re.search(cells, page, re.DOTALL), score
    assert "stage spatial, after step 2" in page
    assert page.count("<h1>demo</h1>") == 1


def test_a_bar_is_green_only_above_chance_and_baseline(run: Path) -> None:
    file = run / "stages" / "01-spatial" / "evaluation.json"
    for value, baseline, above in ((0.3, 0.2, True), (0.2, 0.2, False), (0.1, 0.2, False), (0.1, None, True)):
        score = {"task": "t", "metric": "m", "value": value, "chance": 0.05, "baseline": baseline, "count": 3}
        file.write_text(json.dumps({"step": 1, "results": [{"scores": [score], "galleries": []}]}))
        assert ('class="track above"' in write_report(run).read_text()) == above


def test_the_page_asks_the_network_for_nothing(run: Path) -> None:
    page = outside_plotly(write_report(run).read_text())
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_texts_are_escaped(run: Path) -> None:
    page = outside_plotly(write_report(run).read_text())
    assert "&lt;script&gt;" in page
    assert "stages: [&lt;b&gt;]" in page


def test_galleries_mark_right_answers_and_captions_show_what_was_expected(run: Path) -> None:
    page = write_report(run).read_text()
    assert re.search(r'class="card right">.*?a cat</div> &check;', page)
    assert re.search(r'class="card ">.*?a dog</div></div>', page)
    assert "What the model wrote" in page
    assert ">bee</span>" in page


def test_hand_over_skipped_steps_and_bad_samples_are_told(run: Path) -> None:
    bad = [{"cause": "broken_image", "where": f"a.tar:{key}", "detail": "cut short"} for key in "xyz"]
    bad += [{"cause": "wrong_json", "where": "a.tar:w", "detail": "no <object>"}]
    log = run / "stages" / "01-spatial" / "quarantine.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in bad) + '{"cause": "wro')
    assert {cause: len(entries) for cause, entries in quarantine_counts(log).items()} == {
        "broken_image": 3,
        "wrong_json": 1,
    }
    page = write_report(run).read_text()
    assert "3 broken image" in page
    assert "a.tar:w: no &lt;object&gt;" in page
    assert "Weights from stage warm-up" in page
    assert "1 of them skipped" in page
    assert re.search(r"<tr><td>visual</td><td class=\"number \">2</td>", page)


def test_evaluations_made_later_are_shown_too(run: Path) -> None:
    score = {
        "task": "later",
        "metric": "image->text R@1",
        "value": 0.98765,
        "chance": None,
        "baseline": None,
        "count": 4,
    }
    later = {"stage": "spatial", "step": 2, "results": [{"scores": [score], "galleries": []}]}
    (run / "evaluation-spatial.json").write_text(json.dumps(later))
    page = write_report(run).read_text()
    assert "stage spatial, evaluated again (evaluation-spatial.json)" in page
    assert "0.988" in page


def test_a_run_that_was_cut_off_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("name: early\n")
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "stages" / "01-a").mkdir(parents=True)
    page = write_report(tmp_path).read_text()
    assert "No stage has been evaluated yet." in page
    assert "0 steps, not complete" in page


@pytest.mark.parametrize("missing", ["plan.yaml", "environment.json"])
def test_a_folder_that_is_no_run_is_refused(run: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_report(run)


def test_every_figure_is_drawn_in_one_panel(run: Path) -> None:
    records = training_records(run / "stages" / "01-spatial" / "metrics.jsonl")
    drawn = panels_of(records)
    names = [name for _, taken in drawn for name in taken]
    assert sorted(names) == sorted(set(records[0]) - {"step", "skipped"})
    by_title = {panel.title: taken for panel, taken in drawn}
    assert by_title["Losses"] == ("loss", "losses/mlm", "losses/univlc")
    assert by_title["Other metrics"] == ("metrics/univlc/new_figure",)
    assert by_title["Share of the peak, share of time"] == ("speed/data_wait", "speed/mfu")
    assert "Other figures" not in by_title
    assert PANELS[-1].pattern == ".*"


def test_curves_leave_out_what_was_not_finite_and_keep_leading_scores(run: Path) -> None:
    metrics = run / "stages" / "01-spatial" / "metrics.jsonl"
    assert ["gradient_norm" in record for record in training_records(metrics)] == [True, False]
    assert evaluation_records(metrics) == [
        {"step": 1, "t/text->image R@1": 0.1},
        {"step": 2, "t/text->image R@1": 0.2},
    ]


def test_smoothing_is_a_trailing_mean() -> None:
    # Window 3: 3; (3 + 6) / 2; (3 + 6 + 0) / 3; (6 + 0 + 12) / 3
    assert smooth([3.0, 6.0, 0.0, 12.0], 3) == pytest.approx([3.0, 4.5, 3.0, 6.0])
    assert smooth([], 3) == []


def test_parts_are_counted_by_stack() -> None:
    counts = count_parts({"carried": ["visual_00.a", "visual_11.b", "visual_norm.c"], "dropped": ["losses.head"]})
    assert {part: (row["carried"], row["dropped"]) for part, row in counts.items()} == {
        "visual": (3, 0),
        "losses": (0, 1),
    }


def test_facts_are_flat_and_known() -> None:
    facts = {"git": {"commit": "abc", "changed": False}, "gpu": "", "cuda": None, "command": ["a", "b"]}
    assert flat_facts(facts) == {"git commit": "abc", "git changed": "False", "command": "a b"}


ROUTING = """<!doctype html><html><head><title>who &lt;goes&gt; where</title><style>body { margin: 7px; }</style>
<script>drawing library</script></head><body><main><h1>who</h1><section class="routing"><style>.routing {}</style>
<section>experts of {where}</section></section></main></body></html>"""


def test_pages_of_tasks_are_part_of_the_report(run: Path) -> None:
    stage = run / "stages" / "01-spatial"
    (stage / "routing.html").write_text(ROUTING.replace("{where}", "stage"))
    (stage / "routing-2.html").write_text(ROUTING.replace("{where}", "stage, again"))
    later = {"stage": "spatial", "step": 2, "results": [{"scores": [], "galleries": []}]}
    (run / "evaluation-spatial.json").write_text(json.dumps(later))
    (run / "evaluation-spatial-routing.html").write_text(ROUTING.replace("{where}", "evaluation"))
    (run / "evaluation-spatial-2.json").write_text(json.dumps({**later, "stage": "spatial-2"}))
    (run / "evaluation-spatial-2-boxes.html").write_text(ROUTING.replace("{where}", "boxes"))
    (run / "routing.html").write_text(ROUTING.replace("{where}", "command"))
    page = outside_plotly(write_report(run).read_text())
    for where, name in (
        *[("stage", "routing.html"), ("stage, again", "routing-2.html")],
        *[("evaluation", "evaluation-spatial-routing.html"), ("boxes", "evaluation-spatial-2-boxes.html")],
    ):
        (frame,) = (one for one in elements(page, "iframe") if one["title"] == f"who <goes> where ({name})")
        assert frame["sandbox"] == ""
        assert frame["srcdoc"].endswith(f"<section>experts of {where}</section></section>")
    assert "experts of command" not in page
    assert len(elements(page, "iframe")) == 4
    assert "drawing library" not in page
    assert "margin: 7px" not in page
    body = page[page.index("</nav>") :]
    order = ("evaluated again", "experts of evaluation", "experts of stage&lt;", "experts of stage, again")
    assert sorted(order, key=body.index) == list(order)


def test_figures_that_are_no_shares_have_no_bar(run: Path) -> None:
    score = {"task": "t", "metric": "experts used", "value": 6.5, "chance": None, "baseline": None, "count": 3}
    for graded in (True, False):
        content = {"step": 1, "results": [{"scores": [{**score, "graded": graded}], "galleries": []}]}
        (run / "stages" / "01-spatial" / "evaluation.json").write_text(json.dumps(content))
        page = write_report(run).read_text()
        assert "<b>6.500</b>" in page
        assert ('class="track' in page) == graded


EVIL = """<script>alert(1)</script><img src="http://evil.example/a.png" onerror="alert(2)"></template></iframe>
<meta http-equiv="refresh" content="0;url=http://evil.example"><a href="javascript:alert(3)" target="_top">x</a>"""


def test_a_run_folder_of_someone_else_runs_nothing_in_the_report(run: Path) -> None:
    own = len(elements(write_report(run).read_text(), "script"))
    stage = run / "stages" / "01-spatial"
    title = f"<title>a</a>{EVIL}</title>"
    (stage / "routing.html").write_text(f"<html>{title}<section class='r\"'>{EVIL}</section>{EVIL}</html>")
    (stage / "x<img src=y onerror=alert(4)>.html").write_text(f"{title}<section>{EVIL}</section>")
    (run / "evaluation-x.json").write_text(json.dumps({"stage": EVIL, "step": EVIL, "results": [], "title": EVIL}))
    (run / "evaluation-x-y.html").write_text(f"{title}<section>{EVIL}</section>")
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "gpu": EVIL, "torch": {EVIL: [EVIL]}}))
    (run / "plan.yaml").write_text(json.dumps({"name": EVIL, "stages": [{"name": EVIL, "steps": 3}]}))
    handover = {"source": EVIL, "carried": [EVIL], "created": [EVIL]}
    (stage / "handover.json").write_text(json.dumps(handover))
    lines = [
        train_line(step, losses={EVIL: step}, metrics={EVIL: step, f"{EVIL}/x": 1.0}, lr={EVIL: 1}) for step in (1, 2)
    ]
    lines += [{"event": "evaluation", "step": step, "scores": {f"{EVIL} R@1": step}} for step in (1, 2)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage / "quarantine.jsonl").write_text(json.dumps({"cause": EVIL, "where": EVIL, "detail": EVIL}) + "\n")
    row = {"query_text": EVIL, "query_image": "http://evil.example/q.png", "answer_texts": [EVIL, EVIL]}
    row |= {"answer_images": ["javascript:alert(5)", f'{IMAGE}" onload="alert(6)'], "correct": [True, False]}
    one = {**row, "answer_texts": [EVIL], "answer_images": [""]}
    score = {"task": EVIL, "metric": EVIL, "value": 0.5, "chance": None, "baseline": None, "count": 3}
    galleries = [{"title": EVIL, "rows": [row]}, {"title": EVIL, "rows": [one]}]
    results = [{"scores": [score], "galleries": galleries}]
    (stage / "evaluation.json").write_text(json.dumps({"step": 1, "results": results}))
    (stage / "rollbacks.json").write_text(json.dumps([{"first_bad": 1, "step": 2, "reason": EVIL, "loaders": []}]))
    page = outside_plotly(write_report(run).read_text())
    found = elements(page)
    frames = [one for one in found if one[""] == "iframe"]
    assert len(frames) == 3
    for frame in frames:
        assert frame["sandbox"] == "", "no script, no form, no other window, nothing of the page around it"
        assert frame["srcdoc"].index("default-src 'none'") < frame["srcdoc"].index("alert(1)")
        assert "src" not in frame
    assert not [one for one in found for name in one if name.startswith("on")]
    scripts = [one for one in found if one[""] == "script"]
    figures = page.count('class="plotly-graph-div"')
    assert len(scripts) == 1 + 2 * figures or len(scripts) == 1 + figures, "those of our own figures alone"
    assert own >= 1
    assert [one["src"] for one in found if one[""] == "img"] == []
    assert {one["href"][0] for one in found if one[""] == "a"} == {"#"}
    assert sum(one[""] == "meta" for one in found) == 2
    for script in re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL):
        assert "alert(1)</" not in script
        assert "<img" not in script


def test_the_summary_comes_first_and_leads_to_everything(run: Path) -> None:
    stages = [{"name": "spatial", "steps": 5}, {"name": "joint", "steps": 7}]
    (run / "plan.yaml").write_text(json.dumps({"name": "demo", "stages": stages}))
    speed = {"samples_per_second": 100.0, "seconds_per_step": 30.0}
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
        ["1", "spatial", "step 4 of 5", "2 min 00 s", "4.000 to 2.500", "100.0", "1 skipped step, 2 bad samples"],
        ["2", "joint", "not begun", "", "", "", ""],
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


def other_values(content: bytes) -> bytes:
    """The same JSON with other things in place of its values."""

    def changed(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: changed(value) for name, value in tree.items()}
        return [changed(one) for one in tree] if isinstance(tree, list) else tree if tree == "train" else {}

    lines = content.splitlines() if content.count(b"}\n") > 1 else [content]
    return b"".join(
        json.dumps(changed(json.loads(line))).encode() + b"\n" for line in lines if line.endswith((b"}", b"]"))
    )


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another kind": lambda content: b"[7]\n[8]\n",
    "other values": other_values,
    "no text": lambda content: b"\xff\xfe" + content,
}
SHOWN_AS_IT_IS = {
    *((f"stages/01-spatial/{name}.jsonl", damage) for name in ("metrics", "quarantine") for damage in ("cut", "empty")),
    *(("environment.json", "other values"), ("evaluation-x.json", "other values")),
    *(("stages/01-spatial/rollbacks.json", "other values"),),
}
"""An incomplete last line is that of a run at work; values of no known form are shown as texts."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        *("environment.json", "evaluation-x.json", "stages/01-spatial/metrics.jsonl"),
        *("stages/01-spatial/evaluation.json", "stages/01-spatial/handover.json", "stages/01-spatial/rollbacks.json"),
        *("stages/01-spatial/complete.json", "stages/01-spatial/quarantine.jsonl"),
    ],
)
def test_a_file_that_is_damaged_is_left_out_and_named(run: Path, name: str, damage: str) -> None:
    stage = run / "stages" / "01-spatial"
    (run / "evaluation-x.json").write_text(json.dumps({"stage": "x", "step": 2, "results": []}))
    (stage / "complete.json").write_text('{"steps": 2}')
    (stage / "quarantine.jsonl").write_text(2 * (json.dumps({"cause": "a", "where": "b", "detail": "c"}) + "\n"))
    rollback = {"first_bad": 1, "step": 2, "reason": "r", "loaders": []}
    (stage / "rollbacks.json").write_text(json.dumps([rollback]))
    whole = write_report(run).read_text()
    assert 'class="damaged"' not in whole
    file = run / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    page = write_report(run).read_text()
    told = re.search(r'<p class="damaged">(.*?)</p>', page)
    assert (told is None) == ((name, damage) in SHOWN_AS_IT_IS)
    if told is not None:
        assert name in told[1]
        assert told[1].count(".json") == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_plan_or_a_failure_that_is_damaged_keeps_no_page_from_being_made(run: Path, damage: str) -> None:
    for name, content in (
        ("failure.json", b'{"code": 1, "said": "x", "rank": null}'),
        ("plan.yaml", b'{"name": "demo"}'),
    ):
        (run / name).write_bytes(DAMAGES[damage](content))
        assert 'id="stage-1"' in write_report(run).read_text()
