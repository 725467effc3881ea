"""A run folder as tests of the report have it, and what a browser would find on a page."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

SCORES: list[dict[str, Any]] = [
    {"task": "unseen style", "metric": "image->text R@1", "value": 0.4321, "chance": 0.00062, "baseline": 0.216},
    {"task": "unseen style", "metric": "image->text R@10", "value": 0.8765, "chance": 0.0062, "baseline": 0.453},
    {"task": "captions", "metric": "BLEU-4", "value": 0.1357, "chance": None, "baseline": None},
]
IMAGE = "data:image/png;base64,AAAA"
PREDICTIONS: dict[str, Any] = {
    "examples": [
        {
            **{"picture": {"source": IMAGE, "text": "picture with boxes"}, "asked": "the <red> one", "given": "left"},
            **{"wanted": "left", "right": True, "measure": "IoU 0.63"},
            "attention": {"source": IMAGE, "text": "81% on patches"},
        },
        {
            **{"picture": {"source": IMAGE, "text": "picture with boxes"}, "asked": "", "given": "left"},
            **{"wanted": "right", "right": False, "measure": "", "attention": None},
        },
    ],
    "notes": ["2 of 9 predictions", "Attention: weights of alignment_05"],
    "marks": "boxes",
}


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


def write_run(folder: Path) -> Path:
    """A run of one stage of two steps, evaluated twice."""
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
        {"title": "grounding: predictions", "rows": [], **PREDICTIONS},
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
