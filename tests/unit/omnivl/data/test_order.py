import numpy as np
import pytest

from omnivl.data.order import Order


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 1023, 1024, 1025, 4097])
def test_every_epoch_is_a_permutation(length):
    order = Order(length, 0, "entry")
    for epoch in range(3):
        places = [order(epoch * length + place) for place in range(length)]
        assert {found for found, _ in places} == {epoch}
        assert sorted(index for _, index in places) == list(range(length))


def test_the_order_is_a_pure_function_of_its_key():
    order = [Order(100, 0, "a")(position) for position in range(300)]
    assert order == [Order(100, 0, "a")(position) for position in range(300)]
    assert order != [Order(100, 1, "a")(position) for position in range(300)]
    assert order != [Order(100, 0, "b")(position) for position in range(300)]
    assert [index for _, index in order[:100]] != [index for _, index in order[100:200]], "epochs differ"


def test_a_place_may_be_asked_for_in_any_order():
    order = Order(5000, 0, "a")
    inside = {position: order(position) for position in range(12_000)}
    assert all(order(position) == inside[position] for position in range(11_999, 0, -997))


def test_the_shuffle_is_even():
    # 10 samples, 5,000 epochs: each of the 100 (place, sample) cells expects 500, deviation sqrt(500 * 0.9) = 21.
    order = Order(10, 7)
    cells = np.zeros((10, 10))
    for position in range(50_000):
        cells[position % 10, order(position)[1]] += 1
    chi_square = ((cells - 500) ** 2 / 500).sum()
    # 81 degrees of freedom, deviation sqrt(162) = 12.7; 150 is more than five deviations away.
    assert chi_square < 150


def test_neighbours_are_not_kept_together():
    order = Order(1000, 3)
    indices = np.array([order(position)[1] for position in range(1000)])
    # Of 999 neighbouring pairs of a random permutation about 2 lie next to each other in the source.
    assert (np.abs(np.diff(indices)) == 1).sum() < 12
    assert abs(np.corrcoef(indices, np.arange(1000))[0, 1]) < 0.15


def test_huge_sources_cost_nothing():
    order = Order(10**12, 0)
    assert 0 <= order(10**12 - 1)[1] < 10**12
    assert order(10**12 + 5)[0] == 1
