"""Predictions of a random model, from the task to the page."""

import json
from pathlib import Path

from oracle import FOOD, encoder_of
from report_pages import elements, outside_plotly

from engine.disk.evaluation import write_evaluation
from engine.report import write_report
from engine.report.run_files import read_evaluation
from omnivl.objectives import VQA, Locate
from omnivl.tasks import ClassificationTask, GroundingTask
from omnivl.tasks.run import run_tasks

ANSWERS = ("contradiction", "neutral", "entailment")
TASKS = (
    GroundingTask(where={**FOOD, "task": ("expressions",)}, max_samples=9, gallery=4),
    ClassificationTask(where={**FOOD, "task": ("entailment",)}, max_samples=9, gallery=24),
)


def test_predictions_and_attention_of_a_random_model_are_on_the_page(run: Path) -> None:
    results = run_tasks(TASKS, encoder_of(Locate(), VQA(answers=ANSWERS)))
    file = run / "stages" / "01-spatial" / "evaluation.json"
    write_evaluation(file, {"step": 2}, results)
    read = [gallery for result in read_evaluation(file)["results"] for gallery in result["galleries"]]
    assert read == [gallery for result in results for gallery in result.galleries]
    page = outside_plotly(write_report(run).read_text())
    items = [one for one in elements(page, "li") if "example" in one.get("class", "")]
    right = [one.right for result in results for gallery in result.galleries for one in gallery.examples]
    assert [one["class"] == "example right" for one in items] == right and len(right) == 4 + 9
    pictures = elements(page, "img")
    assert len(pictures) == 2 * len(items) and len({one["src"] for one in pictures}) == len(pictures)
    assert all(one["src"].startswith("data:image/webp;base64,") and one["alt"] for one in pictures)
    assert page.count("<figcaption>attention: ") == len(items) and page.count('class="legend"') == 1
    assert "4 of 9 predictions, evenly spread" in page and "All 9 predictions" in page
    assert "alignment_00, from the text&#39;s first position" in page
    assert json.loads(file.read_text())["results"][0]["galleries"][0]["examples"][0]["given"] == ""
