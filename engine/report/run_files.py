"""The files of a run as the page reads them: one that is damaged, or not what a run writes, is left out and named."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from engine.processes.files import read_json
from omnivl.tasks.results import Drawing, Example, Gallery, GalleryRow, Score

_T = TypeVar("_T")
REMEDY = "remove it: the page does without"
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, OSError)
"""What readers raise where a file is cut, has flipped bits, was written by somebody else, or cannot be opened."""


class RunFiles:
    """Reads the files of a run, whatever state they are in.

    Attributes:
        damaged: The files that had to be left out, seen from the run's folder, each with what is wrong.
    """

    def __init__(self, run: Path) -> None:
        """Takes the run's folder."""
        self._run = run
        self.damaged: list[str] = []

    def read(self, path: Path, reader: Callable[[Path], _T], otherwise: Any) -> _T:
        """What a file holds; ``otherwise`` if it is missing or damaged.

        Args:
            path: The file.
            reader: Reads it.
            otherwise: For a file that is left out; of the reader's type.
        """
        if not os.path.lexists(path):
            return cast(_T, otherwise)
        try:
            return reader(path)
        except _DAMAGE as error:
            name = path.relative_to(self._run).as_posix()
            said = str(error).replace(str(path), name)  # our own errors name the file themselves
            self.damaged.append(said if said.startswith(name) else f"{name}: {type(error).__name__}: {error}")
            return cast(_T, otherwise)


def read_evaluation(path: Path) -> dict[str, Any]:
    """``evaluation.json`` with its scores and galleries as ``omnivl.tasks.results`` has them.

    Raises:
        ValueError: A value is of another kind. Also KeyError and TypeError, where something is missing.
    """
    content = read_json(path, dict, REMEDY)
    results = [
        {
            "scores": [_score(one) for one in result["scores"]],
            "galleries": [_gallery(one) for one in result.get("galleries", ())],
        }
        for result in content["results"]
    ]
    return {"stage": str(content.get("stage", "")), "step": content["step"], "results": results}


def _score(tree: Mapping[str, Any]) -> Score:
    score = Score(**{one.name: tree[one.name] for one in fields(Score) if one.name in tree})
    ends = () if score.interval is None else score.interval
    numbers = [score.value, score.count, *ends, *(one for one in (score.chance, score.baseline) if one is not None)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"got a score without a number: {dict(tree)}")
    return score


def _gallery(tree: Mapping[str, Any]) -> Gallery:
    examples = tuple(map(_example, tree.get("examples", ())))  # older versions wrote rows alone
    notes = tuple(map(str, tree.get("notes", ())))
    return Gallery(
        str(tree["title"]), tuple(map(_gallery_row, tree["rows"])), examples, notes, str(tree.get("marks", ""))
    )


def _example(tree: Mapping[str, Any]) -> Example:
    asked, given, wanted = (str(tree[name]) for name in ("asked", "given", "wanted"))
    attention = tree.get("attention")
    seen = None if attention is None else _drawing(attention)
    picture, measure = _drawing(tree["picture"]), str(tree.get("measure", ""))
    return Example(picture, asked, given, wanted, bool(tree["right"]), measure, seen)


def _drawing(tree: Mapping[str, Any]) -> Drawing:
    return Drawing(str(tree["source"]), str(tree["text"]))


def _gallery_row(tree: Mapping[str, Any]) -> GalleryRow:
    texts, images, correct = (tuple(tree[name]) for name in ("answer_texts", "answer_images", "correct"))
    if not len(texts) == len(images) == len(correct) > 0:
        raise ValueError(
            f"got {len(texts)} answers, {len(images)} pictures, {len(correct)} marks; equal numbers, not 0"
        )
    return GalleryRow(str(tree["query_text"]), str(tree["query_image"]), texts, images, correct)


def read_handover(path: Path) -> dict[str, Any]:
    """``handover.json``: the source, and names of tensors by fate.

    Raises:
        ValueError: A fate has no list of names.
    """
    content = read_json(path, dict, REMEDY)
    lists = {fate: names for fate, names in content.items() if fate != "source"}
    for fate, names in lists.items():
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{fate}: got no list of names")
    return {**lists, "source": str(content["source"])}
