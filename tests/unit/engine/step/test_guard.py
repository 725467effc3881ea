"""The guard's rule on figures that can be worked out by hand."""

import json
import math
from collections.abc import Sequence

import pytest

from engine.step.guard import Guard, GuardConfig, Trouble, culprits
from engine.step.report import StepResult

CONFIG = GuardConfig(max_skipped_steps=3, spike_factor=4.0, spike_window=6, spike_steps=2)
USUAL = (2.0, 4.0, 3.0, 3.0, 2.0, 4.0)
# Median 3, distances 1 1 0 0 1 1: median distance 1, a deviation of 1.4826, a band up to 3 + 4 * 1.4826 = 8.9304


def result(loss: float) -> StepResult:
    return StepResult(loss, {"mlm": loss, "univlc": 1.0}, {}, 1.0, {}, skipped=not math.isfinite(loss))


def judged(guard: Guard, losses: Sequence[float], first: int = 1, kind: str = "image_text") -> list[Trouble | None]:
    return [guard.judge(first + index, [kind, kind], result(loss)) for index, loss in enumerate(losses)]


def test_the_band_ends_where_the_rule_says() -> None:
    within, guard = Guard(CONFIG), Guard(CONFIG)
    assert judged(within, (*USUAL, 8.9303)) == [*judged(guard, USUAL), None] == [None] * 7
    assert not within.in_trouble
    assert judged(guard, (8.9305,), 7) == [None]
    assert guard.in_trouble, "one outlier is no spike yet, but nothing saved from now on may be gone back to"
    (trouble,) = judged(guard, (9.5,), 8)
    assert trouble == Trouble(
        7, "loss 9.5 is above its band (up to 8.93, guard.spike_factor) in 2 steps, which is guard.spike_steps", False
    )


def test_an_outlier_on_its_own_is_forgotten_and_not_learnt_from() -> None:
    guard = Guard(CONFIG)
    assert judged(guard, (*USUAL, 50.0, 3.0, 50.0, 3.0, 50.0)) == [None] * 11
    assert guard.state()["losses"] == {"image_text": [3.0, 3.0, 2.0, 4.0, 3.0, 3.0]}


def test_kinds_are_judged_apart() -> None:
    guard = Guard(CONFIG)
    judged(guard, USUAL)
    assert judged(guard, (90.0, 91.0, 90.0), 7, "video_text") == [None] * 3, "nothing is known of them yet"
    assert [trouble is None for trouble in judged(guard, (91.0, 99.0, 99.0), 10, "video_text")] == [True, True, False]
    assert judged(guard, (3.0,), 13) == [None]


def test_losses_that_hardly_move_have_a_band_of_one_percent() -> None:
    guard = Guard(CONFIG)
    assert judged(guard, (5.0, 5.0, 5.0, 5.19, 5.19)) == [None] * 5  # up to 5 + 4 * 0.05
    assert [trouble is None for trouble in judged(guard, (5.3, 5.3), 6)] == [True, False]


def test_nothing_is_judged_without_a_factor() -> None:
    guard = Guard(GuardConfig())
    assert judged(guard, (1.0,) * 200 + (1e9,) * 50) == [None] * 250
    assert guard.state()["losses"] == {}


def test_skipped_steps_count_by_themselves_and_begin_the_trouble() -> None:
    guard = Guard(CONFIG)
    judged(guard, USUAL)
    assert judged(guard, (math.nan, math.inf), 7) == [None, None]
    assert (guard.skipped, guard.skipped_in_a_row) == (2, 2)
    (trouble,) = judged(guard, (math.nan,), 9)
    assert trouble is not None
    assert (trouble.first_bad, trouble.skipped) == (7, True)
    assert trouble.what == "mlm not finite in 3 steps in a row, which is guard.max_skipped_steps"
    assert culprits(StepResult(1.0, {"mlm": 1.0}, {}, math.inf, {}, skipped=True)) == "the gradient"


def test_an_outlier_before_skipped_steps_is_the_first_bad_one() -> None:
    guard = Guard(CONFIG)
    judged(guard, USUAL)
    assert judged(guard, (50.0, math.nan), 7) == [None, None]
    (trouble,) = judged(guard, (50.0,), 9)
    assert trouble is not None
    assert trouble.first_bad == 7


@pytest.mark.parametrize("cut", range(1, 11))
def test_its_state_goes_on_anywhere(cut: int) -> None:
    losses = (*USUAL, 3.1, 50.0, math.nan, 50.0, 3.0)
    whole, first = Guard(CONFIG), Guard(CONFIG)
    expected = judged(whole, losses)
    before = judged(first, losses[:cut])
    state = json.loads(json.dumps(first.state()))
    second = Guard(CONFIG, first.skipped, first.skipped_in_a_row, state)
    assert before + judged(second, losses[cut:], 1 + cut) == expected
    assert second.state() == whole.state()
    assert any(expected)
