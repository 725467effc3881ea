"""A machine with round figures, and counted work of models on ``meta``."""

from collections.abc import Callable

import pytest

from engine.estimate.hardware import HardwareConfig, LinkConfig, RateConfig
from engine.estimate.live import LivePeak
from engine.estimate.operations import Operation
from engine.estimate.work import LayerSize, ModelWork, Pass
from engine.hosts.zero.sizes import ZeroSizes


@pytest.fixture
def machine() -> HardwareConfig:
    """1 TFLOP/s, 100 GB/s of memory, 10 GB/s within a node, 1 GB/s between, no latency."""
    return HardwareConfig(
        name="round figures",
        device="gpu",
        memory_gib=16.0,
        peak_tflops=RateConfig(1.0, 1.0),
        product_share=RateConfig(1.0, 1.0),
        attention_share=RateConfig(0.5, 0.5),
        memory_gigabytes_per_second=100.0,
        memory_share=1.0,
        operation_seconds=0.0,
        processes_per_node=4,
        within_node=LinkConfig(10.0, 1.0, 0.0),
        between_nodes=LinkConfig(1.0, 1.0, 0.0),
        overlaps=True,
        host_memory_gib=64.0,
        host_gigabytes_per_second=10.0,
        storage_gigabytes_per_second=1.0,
        cores_per_node=10,
        core_images_per_second=100.0,
    )


Work = Callable[..., ModelWork]


@pytest.fixture
def even_work() -> Work:
    """Equal layers: each 1 s forward and 2 s backward on ``machine``, no bytes, a million parameters."""

    def build(layers: int, *, experts: int = 0, routed: float = 0.0, joined: float = 0.0) -> ModelWork:
        forward, backward = ({Operation("product", "bf16", flops, 0.0): 1.0} for flops in (1e12, 2e12))
        names = [f"visual_{number:02d}" for number in range(layers)]
        passes = tuple(
            Pass(
                layer=name,
                forward=forward,
                backward=backward,
                joined=joined,
                joined_gradient=0.0,
                joins=float(joined > 0),
                routed=routed,
                routed_gradient=routed,
                crossing=0.0,
                crossing_gradient=0.0,
                activations=8_000_000,
            )
            for name in names
        )
        size = LayerSize(
            **{"trained": 1_000_000, "frozen": 0, "twins": 500_000, "experts": experts, "resting_experts": 0},
            **{"active": 1_000_000, "queue": 1000},
        )
        peak = LivePeak(8_000_000 * layers, 9_000_000 * layers, 10_000_000 * layers)
        sizes = ZeroSizes(bucket=1_000_000, prefetch=1_500_000, live=4_500_000, reuse=1)
        return ModelWork(passes, dict.fromkeys(names, size), 1, sizes, (peak,), 3e12 * layers, 1.0)

    return build
