"""The share of its rate that attention reaches: the formula by hand, and the public figures that it is made from."""

from dataclasses import replace

import pytest

from engine.estimate.attention import reached
from engine.estimate.hardware import HardwareConfig
from engine.estimate.operations import Operation


def test_by_hand() -> None:
    assert reached(200, 128) == pytest.approx(1 / 2)  # as long again at the ends of rows
    assert reached(600, 128) == pytest.approx(3 / 4)
    assert reached(600, 42) == pytest.approx(3 / 4 * (2 / 3) * 149 / 128)


# TFLOP/s of FlashAttention-2 on an H100 in heads of 128: forward, backward; arXiv 2407.08608, figures 5 and 6.
_RATES = {512: (309, 214), 1024: (350, 260), 2048: (362, 291), 4096: (368, 310), 8192: (370, 318), 16384: (370, 322)}


@pytest.mark.parametrize("keys", _RATES)
def test_it_meets_what_was_measured(keys: int) -> None:
    forward, backward = (1 / rate for rate in _RATES[keys])
    long = [1 / rate for rate in (370, 322)]
    measured = (long[0] + 2.5 * long[1]) / (forward + 2.5 * backward)  # the backward pass has 2.5 times the operations
    assert reached(keys, 128) == pytest.approx(measured, rel=0.03)


def test_an_accelerator_takes_longer_for_short_rows_and_a_cpu_does_not(machine: HardwareConfig) -> None:
    attention = Operation("attention", "bf16", 1e12, 0.0, (200, 128))
    assert machine.seconds({attention: 1.0}) == pytest.approx(4.0)  # half of its share of 0.5
    assert machine.seconds({replace(attention, shape=()): 1.0}) == pytest.approx(2.0)
