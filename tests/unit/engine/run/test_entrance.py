"""What is looked at before layouts are searched, which takes a while."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.disk.run_folder import RunFolder, RunFolderError
from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.run import entrance
from engine.run.earlier import Start
from engine.run.entrance import RunOptions, enter

TEXT = """
name: open
seed: 1
model: {preset: tiny}
parallel: {host: HOST, precision: fp32}
batch: {micro_batch_size_per_gpu: 4}
stages:
  - name: one
    steps: 3
    data: [{source: SOURCE, kind: image_text}]
    objectives: [mlm]
"""
CPU = torch.device("cpu")


class SearchedError(Exception):
    """The search has begun."""


@pytest.fixture(autouse=True)
def search(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any) -> None:
        raise SearchedError

    monkeypatch.setattr(entrance, "with_layouts", searched)


def plan(source: str = "emoji", host: str = "auto", **others: str) -> Plan:
    text = TEXT.replace("HOST", host).replace("SOURCE", source)
    for before, after in others.items():
        text = text.replace(f"{before}: ", f"{before}: {after} #")
    return parse_plan(text)


def test_a_wrong_path_is_said_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"stages.0.data.0.source"):
        enter(RunFolder(tmp_path / "run"), plan(str(tmp_path / "gone.tar")), RunOptions(tmp_path / "run"), CPU)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SearchedError):
        enter(RunFolder(tmp_path / "run"), plan(), RunOptions(tmp_path / "run"), CPU)


def test_an_occupied_folder_is_said_before_the_search(tmp_path: Path) -> None:
    """Another seed is another run; the layout that a search chose there is no difference."""
    run = RunFolder(tmp_path)
    run.stage(0, "one").checkpoints.mkdir(parents=True)
    run.plan.write_text(plan(host="zero").to_yaml())
    options = RunOptions(run.path, offline=True)
    with pytest.raises(RunFolderError, match="seed") as refused:
        enter(run, plan(seed="2"), options, CPU)
    assert "host" not in str(refused.value)
    with pytest.raises(SearchedError):
        enter(run, plan(), options, CPU)
    with pytest.raises(SearchedError):
        enter(run, plan(seed="2"), RunOptions(run.path, Start(fresh=True), offline=True), CPU)


def test_an_unknown_stage_is_said_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--stage: got 'two'; allowed are one"):
        enter(RunFolder(tmp_path), plan(), RunOptions(tmp_path, Start(stage="two"), offline=True), CPU)
