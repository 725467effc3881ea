"""Turns, spreads and ratios."""

import time

import pytest
import torch

from benchmarks.measure import Ratio, Spread, alternate, over, rates, short, take_turns

CPU = torch.device("cpu")


def test_spread_of_three_values():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, least=1.0, most=3.0, rounds=3)
    assert str(Spread.of([0.5, 0.25])) == "0.375 (0.250 to 0.500)"


def test_contenders_take_turns_in_alternating_order():
    calls = []

    def clocked(name, seconds):
        def call():
            calls.append(name)
            return seconds

        return call

    found = alternate({"a": clocked("a", 1.0), "b": clocked("b", 2.0)}, rounds=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_the_slower_contender_takes_longer():
    seconds = take_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 3, CPU)
    assert all(slow >= 0.02 > fast for slow, fast in zip(seconds["slow"], seconds["fast"], strict=True))


def test_ratios_are_taken_within_a_round():
    # The second round was ten times slower for both: the ratio does not notice.
    assert over([2.0, 20.0], [1.0, 10.0]) == Spread(2.0, 2.0, 2.0, 2)
    assert rates(8, [2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 2)


@pytest.mark.parametrize(
    ("median", "bounds", "met", "target"),
    [
        (0.9, {"at_least": 0.9}, True, "at least 0.9"),
        (0.89, {"at_least": 0.9}, False, "at least 0.9"),
        (1.04, {"at_most": 1.03}, False, "at most 1.03"),
        (1.0, {"at_least": 0.9, "at_most": 1.03}, True, "at least 0.9 and at most 1.03"),
        (1.0, {}, None, "none"),
    ],
)
def test_targets(median, bounds, met, target):
    ratio = Ratio("a / b", Spread.of([median]), **bounds)
    assert ratio.met is met
    assert ratio.target == target


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (0.01234, "0.0123"), (2.0, "2.00")])
def test_short_numbers(value, text):
    assert short(value) == text
