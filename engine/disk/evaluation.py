"""Files of evaluations: a stage's ``evaluation.json`` and ``unevaluated.json``, and those of ``omnivl evaluate``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.disk.run_folder import write_whole
from engine.errors import RunFileError
from engine.processes.files import read_json
from omnivl.tasks.results import Score, TaskResult, write_files


def write_evaluation(path: Path, facts: Mapping[str, Any], results: Sequence[TaskResult], *, prefix: str = "") -> None:
    """Writes an evaluation, and the files that its tasks have made beside it. Called by one process.

    Args:
        path: The file, which is replaced.
        facts: Description of the evaluated weights, at least their ``step``; plain containers.
        results: One per task.
        prefix: Prefix of the names of the tasks' files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(results, path.parent, prefix)
    write_whole(path, json.dumps({**facts, "results": [result.as_json() for result in results]}, indent=1))


def read_scores(path: Path) -> tuple[int | None, tuple[Score, ...]]:
    """The step after which an evaluation was made (None outside of a run), and its scores.

    Raises:
        RunFileError: The file is cut or changed.
    """
    remedy = "remove it, and make another one with omnivl evaluate"
    content = read_json(path, dict, remedy)
    try:
        return content["step"], tuple(Score(**score) for result in content["results"] for score in result["scores"])
    except (KeyError, TypeError) as error:
        raise RunFileError(f"{path}: got a file that is no evaluation ({error!r}); {remedy}") from error


def read_failed(path: Path) -> dict[int, str]:
    """The failed evaluations of a stage: why each failed, by its step.

    Args:
        path: ``unevaluated.json``; may be missing.

    Raises:
        RunFileError: It is cut or changed.
    """
    remedy = "remove it: what failed is then evaluated again where it is still due"
    content = read_json(path, dict, remedy) if path.is_file() else {}
    try:
        return {int(step): str(problem) for step, problem in content.items()}
    except ValueError as error:
        raise RunFileError(f"{path}: got something else than a step ({error}); {remedy}") from error


def write_failed(path: Path, step: int, problem: str) -> None:
    """Adds a failed evaluation, so that no later start repeats it. Called by one process."""
    write_whole(path, json.dumps({**read_failed(path), step: problem}, indent=1))
