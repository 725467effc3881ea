"""The table of scores on the console."""

import io

import pytest
from rich.console import Console

from engine.report import score_table
from engine.report.table import format_share
from omnivl.tasks import Score


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0.000"), (0.4321, "0.432"), (0.000625, "0.0006"), (1.0, "1.000")]
)
def test_shares_have_three_decimals_or_as_many_as_show_something(value: float | None, text: str) -> None:
    assert format_share(value) == text


def test_every_score_stands_beside_chance_and_baseline_in_80_columns() -> None:
    scores = [
        Score("unseen style", "image->text R@1", 0.4321, 0.000625, 0.216, 1599),
        Score("unseen style", "image->text, re-ranked R@10", 0.8765, 0.00625, None, 1599),
        Score("captions", "BLEU-4", 0.1357, None, None, 256),
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(scores, "demo"))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["unseen", "style", "image->text", "R@1", "0.432", "0.0006", "0.216", "1599"] in rows
    assert ["image->text,", "re-ranked", "R@10", "0.876", "0.006", "-", "1599"] in rows
    assert ["captions", "BLEU-4", "0.136", "-", "-", "256"] in rows


def test_intervals_have_a_column_where_there_are_some() -> None:
    scores = [
        Score("answers", "accuracy", 0.4321, 0.25, None, 1599, interval=(0.41, 0.454)),
        Score("answers", "mean rank", 3.5, 5.5, None, 1599),
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(scores, "demo"))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["answers", "accuracy", "0.432", "±.022", "0.250", "-", "1599"] in rows
    assert ["mean", "rank", "3.500", "5.500", "-", "1599"] in rows
