"""Fits against laws that are known."""

import numpy as np
import pytest

from engine.sweep.fits import efficiency, fit_power_law, front


def test_an_exact_law_is_found() -> None:
    x = [1e6, 3e6, 1e7, 3e7, 1e8]
    law = fit_power_law(x, [1.5 + 400 * value**-0.34 for value in x])
    assert law is not None
    assert law.floor == pytest.approx(1.5, rel=1e-3)
    assert law.scale == pytest.approx(400, rel=2e-2)
    assert law.exponent == pytest.approx(0.34, rel=2e-3)
    assert law.at([1e9])[0] == pytest.approx(1.5 + 400 * 1e9**-0.34, rel=1e-3)


def test_the_band_holds_the_law_as_often_as_it_says() -> None:
    random, x = np.random.default_rng(0), np.geomspace(1e6, 1e9, 12)
    truth = 1.0 + 100 * x**-0.3
    held = 0
    for _ in range(200):
        law = fit_power_law(list(x), list(truth + random.normal(0, 0.01, len(x))))
        assert law is not None
        middle = float(np.sqrt(x[0] * x[-1]))
        held += abs(law.at([middle])[0] - (1.0 + 100 * middle**-0.3)) <= law.band([middle])[0]
    assert 0.9 <= held / 200 <= 0.985


def test_too_few_points_give_no_fit() -> None:
    assert fit_power_law([1.0, 2.0, 3.0, 3.0], [3.0, 2.0, 1.0, 1.1]) is None


def test_the_front_has_what_nothing_cheaper_beats() -> None:
    cost, loss = [1.0, 2.0, 2.0, 3.0, 4.0], [3.0, 2.5, 2.0, 2.2, 1.0]
    assert front(cost, loss) == [0, 2, 4]


def test_efficiency_is_of_the_smallest_run() -> None:
    assert efficiency([4, 1, 2], [300.0, 100.0, 180.0]) == pytest.approx([0.75, 1.0, 0.9])
