"""The page of a run: it shows the content of the files, and loads nothing over the network."""

import html
import json
import re
from pathlib import Path

import pytest
from report_pages import SCORES, elements, outside_plotly

from engine.report import write_report
from engine.report.curves import evaluation_records, panels_of, smooth, training_records
from engine.report.stage_files import count_parts, flat_facts, quarantine_counts
from engine.report.table import format_share
from engine.telemetry.panels import PANELS
from omnivl.tasks.drawn import GIVEN, RIGHT


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


def test_predictions_say_what_was_asked_given_and_right_and_what_pictures_show(run: Path) -> None:
    page = outside_plotly(write_report(run).read_text())
    assert "<h3>grounding: predictions</h3>" in page
    assert '<p class="soft">2 of 9 predictions</p>' in page
    first, second = re.findall(r'<li class="example (?:right|wrong)">.*?</li>', page, re.DOTALL)
    assert first.startswith('<li class="example right"><span class="mark">&check; right</span>')
    assert second.startswith('<li class="example wrong"><span class="mark">&cross; wrong</span>\n')
    for said in ("IoU 0.63", "<p>the &lt;red&gt; one</p>", "given:</span> <b>left</b>", "right:</span> left"):
        assert said in first
    assert "right:</span> right" in second and "attention" not in second
    assert "<figcaption>attention: 81% on patches</figcaption>" in first
    assert [one["alt"] for one in elements(first, "img")] == [
        "picture with boxes",
        "what the model saw, coloured by attention",
    ]
    assert all(one["src"].startswith("data:") for one in elements(page, "img"))


def test_the_legend_has_the_colours_that_are_drawn(run: Path) -> None:
    page = outside_plotly(write_report(run).read_text())
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in (RIGHT, GIVEN)]
    assert re.findall(r"\.legend \.is-(?:right|given) \{ border: 3px (\w+) (#\w+); \}", page) == [
        *zip(("solid", "dashed"), colours, strict=True)
    ]
    assert 'Drawn boxes: <i class="is-right"></i>right (green, continuous) <i class="is-given "></i>given' in page
    file = run / "stages" / "01-spatial" / "evaluation.json"
    file.write_text(file.read_text().replace('"marks": "boxes"', '"marks": ""'))
    assert 'class="legend"' not in write_report(run).read_text()


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


def test_figures_of_which_less_is_better_have_an_arrow(run: Path) -> None:
    score = {"task": "t", "metric": "MAE", "value": 0.5, "chance": None, "baseline": None, "count": 3, "graded": False}
    for known in ({}, {"lower_is_better": False}, {"lower_is_better": True}):
        content = {"step": 1, "results": [{"scores": [{**score, **known}], "galleries": []}]}
        (run / "stages" / "01-spatial" / "evaluation.json").write_text(json.dumps(content))
        page = write_report(run).read_text()
        lower = known.get("lower_is_better", False)
        assert ('title="lower is better">MAE \N{DOWNWARDS ARROW}</td>' in page) == lower
        assert ('<td class="metric">MAE</td>' in page) != lower
