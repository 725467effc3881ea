"""The notebooks of the tutorials run from front to back, and hold no outputs.

Cells are executed in one namespace, as a notebook does; what the last line of a cell is worth is shown as a notebook
shows it. No notebook software is needed.
"""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import TUTORIALS

import omnivl
from engine.errors import RunError

pytestmark = pytest.mark.integration


def read(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((TUTORIALS / name).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells: list[dict[str, Any]] = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    return cells


def execute(cells: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """The names that the cells leave behind, and what the last expression of each cell is worth."""
    names: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), cell["id"])
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if last is not None:
            values.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), names))
    return names, values


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_outputs_and_their_links_lead_somewhere(path: Path) -> None:
    for cell in read(path.name):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        for part in "".join(cell["source"]).split("](")[1:]:
            assert cell["cell_type"] == "code" or (TUTORIALS / part.partition(")")[0]).is_file(), part


def test_the_notebook_trains_a_model_and_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    names, values = execute(read("python.ipynb"))
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    trained, loaded, shapes, cosines, labels, captions, found, routing, experts = values
    assert repr(trained).replace("cuda:0", "cpu") == repr(loaded)
    assert "notebook, stage only, step 20" in repr(loaded) and "<table>" in loaded._repr_html_()
    assert [tuple(shape) for shape in shapes] == [(3, 16), (3, 16), (1, 16)]
    assert torch.equal(cosines, names["images"] @ names["texts"].T)
    assert [len(row) for row in labels] == [3, 3, 3] and len(captions) == 3
    assert [one.index for one in found] == cosines[:, 0].topk(2).indices.tolist()
    assert "<img" in routing._repr_html_()
    patches, words = experts
    assert patches.shape[0] == 1 and "red" in words
    assert "a side of 1 pixels; allowed are sides of 8 or more" in capsys.readouterr().out


@pytest.mark.full
def test_a_complete_run_is_only_loaded_and_one_that_fails_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    source = "".join(next(cell for cell in read("python.ipynb") if cell["cell_type"] == "code")["source"])
    exec(source[: source.index("model = omnivl.train")], {})
    short = {"stages.only.steps": 2, "stages.only.optimizer.warmup_steps": 1}
    once = omnivl.train("plan.yaml", short)
    written = once.origin.weights.stat().st_mtime_ns
    again = omnivl.train("plan.yaml", ["stages.only.steps=2", "stages.only.optimizer.warmup_steps=1"])
    assert again.origin == once.origin and again.origin.weights.stat().st_mtime_ns == written
    assert torch.equal(again.encode_text("a dog"), once.encode_text("a dog"))
    with pytest.raises(RunError, match=r"^runs/other: the run failed with exit status 2, and has said why above; "):
        omnivl.train("plan.yaml", {"stages.only.data.0.where.style": ["no style"]}, run_folder="runs/other")
