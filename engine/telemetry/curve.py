"""The curve of a stage: cheap scores by time, as lines of ``curve.jsonl`` and in one line of the console.

It has a file of its own because its steps depend on the machine's speed, and ``metrics.jsonl`` is to be equal in two
equal runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from engine.errors import RunFileError
from engine.telemetry.metrics import read_metrics
from engine.telemetry.panels import is_leading_score

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 24


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of a curve. Scores are named ``task/metric``.

    Attributes:
        step: Optimizer steps taken.
        seconds: Of training in the stage before it, without evaluations and checkpoints.
        cost: Seconds that the evaluation took.
        scores: The leading scores, shares in [0, 1].
        chance: What guessing would have, of those for which that has a meaning.
        pixels: What the 16x16-pixel baseline has, where a task names a reference.
        queries: Their numbers of queries.
    """

    step: int
    seconds: float
    cost: float
    scores: Mapping[str, float]
    chance: Mapping[str, float] = field(default_factory=dict)
    pixels: Mapping[str, float] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, Mapping[str, float]]:
        """All but the step, as groups of a record (``MetricsLog.write``)."""
        return {
            **{"scores": self.scores, "chance": self.chance, "pixels": self.pixels, "queries": self.queries},
            "speed": {"seconds": self.seconds, "cost_seconds": self.cost},
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """The point of a line.

        Raises:
            ValueError: A figure is no number. Also KeyError and TypeError, where something is missing.
        """
        named = {name: dict(record[name]) for name in ("scores", "chance", "pixels", "queries")}
        speed = record["speed"]
        point = cls(step=record["step"], seconds=speed["seconds"], cost=speed["cost_seconds"], **named)
        numbers = [point.step, point.seconds, point.cost, *(one for group in named.values() for one in group.values())]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"step {record['step']}: got a figure that is no number")
        return point


def read_curve(file: Path) -> list[CurvePoint]:
    """The points of ``curve.jsonl`` in their order; a last line that a crash left incomplete is left out.

    Args:
        file: May be missing.

    Raises:
        RunFileError: A line is no point.
    """
    records = read_metrics(file)
    try:
        return [CurvePoint.of_record(record) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFileError(
            f"{file}: got a line that is no point of a curve ({error!r}); remove the file: the curve then begins anew"
        ) from error


def leading_names(points: Iterable[CurvePoint]) -> list[str]:
    """The scores that are drawn, in the order of their tasks."""
    return list(dict.fromkeys(name for point in points for name in point.scores if is_leading_score(name)))


def curve_text(points: Sequence[CurvePoint], share: float | None, *, bars: bool) -> str:
    """The newest point in words: ``image->text R@1 0.043, 6.1 x chance, pixels 0.216 (141)  ▁▂▄  1.9 % of the time``.

    Args:
        points: At least one.
        share: Of the time of training that the curve has taken; None before the first step.
        bars: Whether the first score of all points is drawn as well, which needs a console of more than ASCII.
    """
    last, parts = points[-1], []
    for name in leading_names([last])[:1]:
        score, chance, pixels = last.scores[name], last.chance.get(name), last.pixels.get(name)
        parts.append(f"{name} {score:.3f}")
        parts[0] += f", {score / chance:.1f} x chance" if chance else ""
        parts[0] += f", pixels {pixels:.3f}" if pixels is not None else ""
        parts[0] += f" ({last.queries[name]:,} queries)" if name in last.queries else ""
        if bars and len(points) > 1:
            parts.append(sparkline([point.scores[name] for point in points if name in point.scores]))
    if share is not None:
        parts.append(f"{share:.1%} of the time".replace("%", " %"))
    return "  ".join(parts)


def sparkline(values: Sequence[float]) -> str:
    """The newest values as bars between zero and the largest of them."""
    shown = values[-_MOST_BARS:]
    top = max([*shown, 0.0])
    steps = len(_BARS) - 1
    return "".join(_BARS[0 if top <= 0 else round(steps * max(0.0, value) / top)] for value in shown)
