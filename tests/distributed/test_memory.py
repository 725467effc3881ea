"""What a process holds under ZeRO-3 while a chain is built, trained and written: its share, and a few layers."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_probe import Sizes, measure_processes

pytestmark = pytest.mark.distributed

PROCESSES, SLACK = 4, 40_000_000
"""Bytes that are nobody's share: what Python, autograd and the collectives hold for a while."""


def test_no_process_ever_holds_the_whole_model(tmp_path: Path) -> None:
    layout = {"host": "zero", "zero_stage": 3, "precision": "bf16"}
    found: dict[bool, Any] = {}
    for by_layer in (True, False):
        folder = tmp_path / str(by_layer)
        found[by_layer] = measure_processes(
            PROCESSES, layout, {}, by_layer=by_layer, steps=2, folder=folder, timeout=120
        )
    sizes = Sizes(**found[True]["sizes"])
    whole, layer = 4 * (sizes.trained + sizes.resting), 4 * sizes.largest
    peaks = found[True]["peaks"]
    assert found[False]["peaks"]["build"] > whole  # which is what the bounds below stay away from
    assert whole > 14 * layer
    # Its share of the parameters; the layer that is being made, and the copy that is made of a part of it.
    assert peaks["build"] < whole / PROCESSES + 2 * layer + SLACK
    # The bucket, and the layers that are whole at a time (``ZeroSizes.live`` counts three), forward and backward.
    assert peaks["steps"] < sizes.rule(PROCESSES) + 5 * layer + 2 * SLACK
    for phase in ("checkpoint", "weights"):
        assert peaks[phase] < sizes.rule(PROCESSES) + 4 * layer + 2 * SLACK, phase
    # Starting values are those of the whole build, hence so is everything that follows.
    assert found[True]["losses"] == found[False]["losses"]
