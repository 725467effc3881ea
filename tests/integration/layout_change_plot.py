"""Draws docs/images/layout_change.svg: a run that changes its layout twice, on top of one that does not.

python tests/integration/layout_change_plot.py
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import Pretraining
from test_resume import change_layouts

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "layout_change.svg"
STEPS, ENDS = 60, (20, 40)
STRETCHES = (("ZeRO-3 on 2 processes", "#1f77b4"), ("pipeline 2 x 2, ZeRO-1", "#d62728"), ("one process", "#2ca02c"))
WIDTH, LEFT, RIGHT = 760, 70, 740
LOSSES, DIFFERENCES = (60, 260), (300, 400)
"""Top and bottom of the two panels."""


def picture(whole: Sequence[float], moved: Sequence[float], ends: Sequence[int]) -> str:
    """The picture as SVG.

    Args:
        whole: Losses of the uninterrupted run, from step 1.
        moved: Those of the other one.
        ends: Steps after which its layout changed.
    """
    apart = [abs(one - other) / abs(other) for one, other in zip(moved, whole, strict=True)]
    low, high = min(whole), max(whole)
    ceiling = max(apart) or 1.0
    edges = [0, *ends, len(whole)]
    parts = [
        _text(LEFT, 20, f"Loss of a run that changes its layout after steps {ends[0]} and {ends[1]}", size=14),
        _text(LEFT, 40, "grey: uninterrupted, on one process; dots: the run that changes"),
        _text(LEFT, DIFFERENCES[0] - 8, f"relative difference of the loss, at most {ceiling:.0e}"),
        *_scale(LOSSES, low, high, "{:.2f}"),
        *_scale(DIFFERENCES, 0.0, ceiling, "{:.0e}"),
        _line([(_x(step, whole), _y(loss, low, high, LOSSES)) for step, loss in enumerate(whole, 1)], "#aaaaaa", 4),
    ]
    for (name, colour), begin, end in zip(STRETCHES, edges[:-1], edges[1:], strict=True):
        steps = range(begin + 1, end + 1)
        parts += [
            f'<circle cx="{_x(step, whole):.1f}" cy="{_y(moved[step - 1], low, high, LOSSES):.1f}" r="2.5" '
            f'fill="{colour}"/>'
            for step in steps
        ]
        points = [(_x(step, whole), _y(apart[step - 1], 0.0, ceiling, DIFFERENCES)) for step in steps]
        parts += [_line(points, colour, 1.5), _text(points[0][0], DIFFERENCES[1] + 36, name, colour=colour)]
        parts.append(_text(points[-1][0], DIFFERENCES[1] + 16, str(end), anchor="middle"))
    for end in ends:
        middle = _x(end + 0.5, whole)
        parts += [
            f'<path d="M{middle:.1f} {top}V{bottom}" stroke="#444" stroke-dasharray="4 4"/>'
            for top, bottom in (LOSSES, DIFFERENCES)
        ]
    height = DIFFERENCES[1] + 50
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>"]) + "\n"


def _x(step: float, whole: Sequence[float]) -> float:
    return LEFT + (RIGHT - LEFT) * (step - 0.5) / len(whole)


def _y(value: float, low: float, high: float, panel: tuple[int, int]) -> float:
    return panel[1] - (panel[1] - panel[0]) * (value - low) / (high - low)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{placed}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _scale(panel: tuple[int, int], low: float, high: float, form: str) -> list[str]:
    """The left axis of a panel, with its ends."""
    top, bottom = panel
    return [
        f'<path d="M{LEFT} {top}V{bottom}H{RIGHT}" stroke="#444" fill="none"/>',
        _text(LEFT - 6, top + 4, form.format(high), anchor="end"),
        _text(LEFT - 6, bottom + 4, form.format(low), anchor="end"),
    ]


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _losses(metrics: Sequence[Any]) -> list[float]:
    return [line["loss"] for line in metrics if line["event"] == "train"]


def main() -> int:
    """Runs both, draws, and says how far they are apart."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Pretraining(Path(folder))
        try:
            whole, moved = (_losses(metrics) for metrics in change_layouts(runs, STEPS, *ENDS))
        finally:
            runs.close()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(whole, moved, ENDS), encoding="utf-8")
    print(f"{PICTURE}: {len(whole)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
