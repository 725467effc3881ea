"""Seconds until a step's samples are there."""

from dataclasses import replace

import pytest

from engine.estimate.hardware import HardwareConfig
from engine.estimate.loading import loading_seconds


def test_storage_and_cores_by_hand(machine: HardwareConfig) -> None:
    found = loading_seconds(machine, node_bytes=3e9, node_images=5000)
    assert found == pytest.approx({"storage": 3.0, "decoding": 5.0})  # 1 GB/s; ten cores with 100 images a second each
    assert loading_seconds(machine, node_bytes=0, node_images=5000, decoded_images_per_second=500)["decoding"] == 10.0
    assert "decoding" not in loading_seconds(replace(machine, core_images_per_second=None), node_bytes=0, node_images=1)
