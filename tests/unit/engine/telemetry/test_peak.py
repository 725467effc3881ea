import pytest
import torch

from engine.telemetry.peak import known_peak, measured_peak, peak_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_known_gpus(name: str, tflops: float) -> None:
    assert known_peak(name) == tflops * 1e12


def test_unknown_gpu() -> None:
    assert known_peak("Some L400 of the future") is None


def test_cpu_is_measured() -> None:
    assert peak_of(torch.device("cpu"), torch.float32).source == "measured"
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32, seconds=0.01) < 1e15
