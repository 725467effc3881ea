"""Which failures of an evaluation are kept, so that no later start repeats it."""

from pathlib import Path
from typing import Any

import pytest

from engine.disk.evaluation import read_failed
from engine.disk.run_folder import StageFolder
from engine.processes import ranks
from engine.run.assessment import Assessment


class Failing(Assessment):
    """An evaluation that fails as one does whose neighbour is gone, or whose own data are bad."""

    def __init__(self, folder: StageFolder) -> None:
        self._folder = folder

    def _evaluate(self, *_: Any) -> float | None:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize(("lost", "kept"), [(TimeoutError, {3: "process 0: RuntimeError"}), (ConnectionError, {})])
def test_a_neighbour_that_has_ended_is_no_failed_evaluation(
    lost: type[Exception], kept: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_problem(key: str, problem: str | None, patience_seconds: float) -> str | None:
        raise lost(key)

    monkeypatch.setattr(ranks, "first_problem", first_problem)
    folder = StageFolder(tmp_path)
    with pytest.raises(RuntimeError, match="Connection reset by peer") as caught:
        Failing(folder).run(3, None, None, "evaluation-1")
    assert isinstance(caught.value.__cause__, lost)
    assert {step: text.partition(": Conn")[0] for step, text in read_failed(folder.unevaluated).items()} == kept
