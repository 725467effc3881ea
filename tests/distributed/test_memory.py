"""Memory of a process under ZeRO-3 while a chain is built, trained and written: its share, and a few layers."""

from pathlib import Path

import patience
import pytest

from benchmarks.memory_probe import Sizes, measure_processes

pytestmark = pytest.mark.distributed

PROCESSES = 3
SLACK = 40_000_000
"""Bytes that are nobody's share: what Python, autograd and the collectives hold for a while."""


def test_no_process_ever_holds_the_whole_model(tmp_path: Path) -> None:
    model = {"hidden_size": 384, "vocab_size": 2048}
    layout = {"host": "zero", "zero_stage": 3, "precision": "bf16"}
    found = measure_processes(
        PROCESSES, layout, model, by_layer=True, steps=1, folder=tmp_path, passed=patience.Limit(180).passed
    )
    sizes, peaks = Sizes(**found["sizes"]), found["peaks"]
    whole, layer, rule = 4 * (sizes.trained + sizes.resting), 4 * sizes.largest, sizes.rule(PROCESSES)
    assert whole > 150_000_000  # what the bounds of the build and of writing would not let pass
    # Its share of the parameters; the layer that is being made, and the copy that is made of a part of it.
    assert peaks["build"] < whole / PROCESSES + 2 * layer + SLACK < 0.8 * whole
    # The bucket, and the layers that are whole at a time (``ZeroSizes.live`` counts three), forward and backward.
    assert peaks["steps"] < rule + 5 * layer + 2 * SLACK
    for phase in ("checkpoint", "weights"):
        assert peaks[phase] < rule + 4 * layer + 2 * SLACK < rule + whole, phase
