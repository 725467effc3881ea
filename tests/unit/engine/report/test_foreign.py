"""Run folders of somebody else, and damaged ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import IMAGE, elements, outside_plotly, train_line

from engine.report import write_report

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
    drawn = {"source": f'{IMAGE}" onload="alert(7)', "text": EVIL}
    example = {"picture": drawn, "attention": drawn, "right": True, **dict.fromkeys(("asked", "given", "wanted"), EVIL)}
    galleries.append({"title": EVIL, "rows": [], "examples": [{**example, "measure": EVIL}], "notes": [EVIL]})
    galleries[-1]["marks"] = EVIL
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
