"""Profiles of machines, and the measured one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.estimate.hardware import HardwareConfig, LinkConfig, load_hardware
from engine.estimate.measure import hardware_yaml, measure_hardware
from engine.estimate.operations import Operation
from engine.telemetry.peak import known_peak
from omnivl.errors import UserError


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200"])
def test_the_profiles_read_and_agree_with_the_table_of_peaks(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.peak_flops("bf16") == known_peak(hardware.name)
    for share in (hardware.product_share, hardware.attention_share):
        assert 0 < share.bf16 <= 1 and 0 < share.fp32 <= 1
    assert hardware.within_node.gigabytes_per_second > hardware.between_nodes.gigabytes_per_second


def test_a_link() -> None:
    assert LinkConfig(10.0, 0.5, 1e-3).seconds(5e9, 2) == pytest.approx(1.002)


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(UserError) as error:
        load_hardware("h10")
    assert str(error.value) == (
        "--hardware: got 'h10', which is no file; allowed are a100, a100-40gb, b200, h100, h100-500w, h200, "
        "xeon-avx512 or the path of a YAML file; name one of them, or measure this machine with `omnivl measure FILE`"
    )


def test_every_mistake_of_a_profile_is_named(tmp_path: Path) -> None:
    text = (Path(__file__).parents[4] / "configs" / "hardware" / "h100.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("device: gpu", "device: tpu").replace("processes_per_node: 8", "processes_per_nod: 8"))
    with pytest.raises(PlanError) as error:
        load_hardware(str(file))
    assert "mine.yaml:4: device: got 'tpu'; allowed 'gpu' or 'cpu'" in str(error.value)
    assert "did you mean 'processes_per_node'" in str(error.value)


def test_this_machine_is_measured_and_read_back(tmp_path: Path) -> None:
    measured = measure_hardware(torch.device("cpu"), local_processes=1, seconds=0.02)
    file = tmp_path / "mine.yaml"
    file.write_text(hardware_yaml(measured))
    read = load_hardware(str(file))
    assert read.device == "cpu" and not read.overlaps
    assert read.peak_tflops.fp32 == pytest.approx(measured.peak_tflops.fp32, rel=1e-3)
    assert 0 < read.product_share.bf16 <= 1 and 0 < read.attention_share.fp32 <= 1
    assert 1e-8 < read.operation_seconds < 1e-2
    assert read.cores_per_node >= 1 and read.multiprocessors is None  # shapes of products count on accelerators


@pytest.mark.parametrize(
    ("name", "rate", "shape"),
    [
        ("h100", 794.5, (2048, 2048, 13312)),
        ("a100", 271.2, (1024, 10240, 5120)),
        ("b200", 1745.0, (1792, 16128, 3072)),
    ],
)
def test_profiles_reach_the_public_measurement_at_its_shape(name: str, rate: float, shape: tuple[int, ...]) -> None:
    rows, columns, depth = shape
    product = Operation("product", "bf16", 2.0 * rows * columns * depth, 0.0, (1, *shape))
    assert product.flops / load_hardware(name).seconds({product: 1.0}) == pytest.approx(rate * 1e12, rel=2e-3)


def test_what_the_cores_of_a_node_decode(machine: HardwareConfig) -> None:
    assert machine.decoded_images_per_second == 10 * 100.0
    assert replace(machine, core_images_per_second=None).decoded_images_per_second is None
