from collections import Counter

import pytest

from omnivl.data.mixture import BLOCK, Mixture
from omnivl.errors import DataError


def test_the_sequence_is_a_pure_function_of_seed_and_step():
    first, second = Mixture([3, 1], 0), Mixture([3, 1], 0)
    forward = [first.entry(step) for step in range(600)]
    backward = [second.entry(step) for step in reversed(range(600))][::-1]
    assert forward == backward
    assert forward != [Mixture([3, 1], 1).entry(step) for step in range(600)]


def test_counts_agree_with_the_sequence():
    mixture = Mixture([3, 1, 0.5], 5)
    seen = Counter()
    for step in range(3 * BLOCK + 7):
        if step % 37 == 0:
            assert Mixture([3, 1, 0.5], 5).counts(step) == tuple(seen[entry] for entry in range(3))
        seen[mixture.entry(step)] += 1


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1], [0.01, 0.99]])
def test_every_block_holds_the_weights_to_within_one(weights):
    mixture = Mixture(weights, 0)
    for block in range(3):
        counts = Counter(mixture.entry(block * BLOCK + place) for place in range(BLOCK))
        for entry, weight in enumerate(weights):
            assert abs(counts[entry] - BLOCK * weight / sum(weights)) <= 1


def test_an_entry_of_weight_zero_never_comes():
    mixture = Mixture([0, 1, 0], 0)
    assert {mixture.entry(step) for step in range(2 * BLOCK)} == {1}


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf")]])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(DataError, match=r"allowed: numbers of at least 0, one of them above 0"):
        Mixture(weights, 0)
