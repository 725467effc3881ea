"""Results of a task: scores as rows of a table, galleries of examples, and files."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omnivl.tasks.scorers.confidence import interval


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        task: The task's name.
        metric: E.g. ``image->text R@1``.
        value: Share in [0, 1] unless the metric's name says otherwise.
        chance: Expected value of guessing; None if that has no meaning.
        baseline: Value of the 16x16-pixel baseline; None if it was not requested.
        count: Number of queries.
        graded: Whether the value is a share and higher is better, so that it can be drawn as a bar towards 1.
        interval: The 95 % confidence interval of a mean over the queries, by the bootstrap; None where there is none.
        lower_is_better: Whether a lower value is better; ``run_tasks`` fills it in, as the task says.
    """

    task: str
    metric: str
    value: float
    chance: float | None
    baseline: float | None
    count: int
    graded: bool = True
    interval: tuple[float, float] | None = None
    lower_is_better: bool = False


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` different places among ``count``, evenly spread from the first on: the rows of a gallery."""
    some = min(most, count)
    return [number * count // some for number in range(some)]


def mean_score(
    task: str,
    metric: str,
    values: Sequence[float] | NDArray[Any],
    *,
    chance: float | None = None,
    baseline: float | None = None,
    clusters: Sequence[Hashable] | None = None,
    graded: bool = True,
) -> Score:
    """The mean of the values of all queries, with its confidence interval.

    Args:
        task: See ``Score``, as for all others.
        metric: See ``Score``.
        values: Of each query, at least one.
        chance: See ``Score``.
        baseline: See ``Score``.
        clusters: What queries share that are no independent draws, such as their picture.
        graded: See ``Score``.
    """
    given = np.asarray(values, dtype=np.float64)
    low, high = interval(given, f"{task}, {metric}", clusters)
    return Score(task, metric, float(given.mean()), chance, baseline, len(given), graded, (low, high))


@dataclass(frozen=True)
class GalleryRow:
    """One query with its answers.

    Attributes:
        query_text: Caption of the query, or the expected answer.
        query_image: PNG as a data URI; empty for a text query.
        answer_texts: Best answers first.
        answer_images: PNGs as data URIs, or empty strings.
        correct: Which answers are right.
    """

    query_text: str
    query_image: str
    answer_texts: tuple[str, ...]
    answer_images: tuple[str, ...]
    correct: tuple[bool, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture of a page: its source as a data URI, and what it shows in words."""

    source: str
    text: str


@dataclass(frozen=True)
class Example:
    """One sample with what a task predicted of it.

    Attributes:
        picture: The sample; of a clip some frames, of a set all pictures, side by side; maybe with boxes or a mask.
        asked: The text that goes with it, such as a question; empty for none.
        given: What was predicted.
        wanted: What is right.
        right: Whether the prediction is.
        measure: How sure the model was, or how near it came; empty where nobody knows.
        attention: What the model saw, coloured by the attention of the text; None where there is none.
    """

    picture: Drawing
    asked: str
    given: str
    wanted: str
    right: bool
    measure: str = ""
    attention: Drawing | None = None


@dataclass(frozen=True)
class Gallery:
    """Some queries with their answers, or some samples with what was predicted of them, for the report.

    Attributes:
        title: Heading.
        rows: Queries.
        examples: Samples.
        notes: What has to be known to read it, such as how the samples were chosen.
        marks: What is drawn into pictures in the two colours of ``omnivl.tasks.drawn``, in the plural; empty: nothing.
    """

    title: str
    rows: tuple[GalleryRow, ...] = ()
    examples: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    marks: str = ""


@dataclass(frozen=True)
class ResultFile:
    """A result that is too large for ``evaluation.json``. One process makes and writes it.

    Of a file that ends in ``.html`` the report shows the part from its first ``<section>`` to its last one, in a
    frame in which no script runs.

    Attributes:
        name: File name, e.g. ``routing.html``.
        write: Writes the file to a path.
    """

    name: str
    write: Callable[[Path], None]


@dataclass(frozen=True)
class TaskResult:
    """Everything one task produced."""

    scores: tuple[Score, ...]
    galleries: tuple[Gallery, ...] = ()
    files: tuple[ResultFile, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain containers for ``evaluation.json``, without files."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "galleries": [asdict(gallery) for gallery in self.galleries],
        }


def write_files(results: Sequence[TaskResult], folder: Path, prefix: str = "") -> list[Path]:
    """Writes the files of all results, each atomically.

    Args:
        results: Results of one evaluation.
        folder: An existing folder.
        prefix: Prefix of each name. A second file of the same name gets a number: ``routing-2.html``.

    Returns:
        Paths of the files.
    """
    written: list[Path] = []
    seen: Counter[str] = Counter()
    for file in (file for result in results for file in result.files):
        seen[file.name] += 1
        name = Path(file.name)
        number = "" if seen[file.name] == 1 else f"-{seen[file.name]}"
        path = folder / f"{prefix}{name.stem}{number}{name.suffix}"
        beside = path.with_name(path.name + ".tmp")
        beside.unlink(missing_ok=True)  # whoever left it, and wherever it leads
        file.write(beside)
        beside.rename(path)
        written.append(path)
    return written
