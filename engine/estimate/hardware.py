"""What a cluster's devices and links can do: one YAML file per kind of machine, in ``configs/hardware``."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal

from engine.estimate.attention import reached
from engine.estimate.operations import Operation, Operations
from engine.estimate.products import product_seconds
from engine.plan.parallel import Precision
from engine.plan.parse import load_section
from moe.ranges import Range
from omnivl.errors import UserError

FOLDERS = (Path("configs/hardware"), Path(__file__).parents[2] / "configs" / "hardware")


CollectiveKind = Literal["gather", "scatter", "other"]
"""Collectives for which a library may have a separate rate."""

PRODUCTS, MEMORY, STARTING = "products", "memory", "starting operations"


@dataclass(frozen=True)
class RateConfig:
    """One value for each precision.

    Attributes:
        bf16: The value in bf16.
        fp32: The value in fp32.
    """

    bf16: Annotated[float, Range(above=0)]
    fp32: Annotated[float, Range(above=0)]


@dataclass(frozen=True)
class LinkConfig:
    """A link between processes.

    Attributes:
        gigabytes_per_second: Rate at which one process sends while it receives at the same rate.
        share: Share of that rate that collectives reach on large messages.
        latency_seconds: Latency of one message.
        gather_share: The same for gathers; null if it equals ``share``.
        scatter_share: The same for reduce-scatters; null if it equals ``share``.
    """

    gigabytes_per_second: Annotated[float, Range(above=0)]
    share: Annotated[float, Range(above=0)]
    latency_seconds: Annotated[float, Range(0)]
    gather_share: Annotated[float, Range(above=0)] | None = None
    scatter_share: Annotated[float, Range(above=0)] | None = None

    def seconds(self, sent_bytes: float, messages: float, kind: CollectiveKind = "other") -> float:
        """How long it takes to send bytes in messages that follow one another."""
        shares = {"gather": self.gather_share, "scatter": self.scatter_share}
        share = shares.get(kind) or self.share
        return sent_bytes / (self.gigabytes_per_second * 1e9 * share) + messages * self.latency_seconds


@dataclass(frozen=True)
class HardwareConfig:
    """A kind of machine, as one process with one device sees it.

    Attributes:
        name: For display.
        device: ``gpu`` or ``cpu``. A CPU has other kernels, and its processes share their cores with the links.
        memory_gib: Memory of the device.
        peak_tflops: Peak rate of dense matrix products.
        product_share: Share of the peak that large matrix products reach, on an accelerator while all multiprocessors
            work on full tiles (``products.py``).
        attention_share: Share of the peak that fused attention reaches, forward and backward together; on an
            accelerator on long rows of heads of 128 (``attention.py``).
        memory_gigabytes_per_second: Bandwidth of the device's memory.
        memory_share: Share of that bandwidth that a layer's operations reach, each of which allocates a new tensor.
        operation_seconds: Time that the process takes to start an operation.
        processes_per_node: Number of devices of a node.
        within_node: Link between devices of a node.
        between_nodes: Link of one device to other nodes.
        overlaps: Whether links work while the device computes.
        host_memory_gib: Host memory of a node.
        host_gigabytes_per_second: Between a device and its host's memory.
        storage_gigabytes_per_second: Between storage and a node, in each direction.
        cores_per_node: Cores of a node's processors.
        core_images_per_second: Images that a core reads, decodes and augments; null where unknown.
        multiprocessors: Of an accelerator; null where the shapes of products are not to be taken into account, as on a
            CPU.
        spread: Deviation of the logarithm of equal devices' speeds. Steps take as long as the slowest of all processes.
    """

    name: str
    device: Literal["gpu", "cpu"]
    memory_gib: Annotated[float, Range(above=0)]
    peak_tflops: RateConfig
    product_share: RateConfig
    attention_share: RateConfig
    memory_gigabytes_per_second: Annotated[float, Range(above=0)]
    memory_share: Annotated[float, Range(above=0)]
    operation_seconds: Annotated[float, Range(0)]
    processes_per_node: Annotated[int, Range(1)]
    within_node: LinkConfig
    between_nodes: LinkConfig
    overlaps: bool
    host_memory_gib: Annotated[float, Range(above=0)]
    host_gigabytes_per_second: Annotated[float, Range(above=0)]
    storage_gigabytes_per_second: Annotated[float, Range(above=0)]
    cores_per_node: Annotated[int, Range(1)]
    core_images_per_second: Annotated[float, Range(above=0)] | None = None
    multiprocessors: Annotated[int, Range(1)] | None = None
    spread: Annotated[float, Range(0)] = 0.0

    def peak_flops(self, precision: Precision) -> float:
        """Floating point operations per second by the data sheet; ``precision`` is not ``auto``."""
        return float(getattr(self.peak_tflops, precision)) * 1e12

    @property
    def decoded_images_per_second(self) -> float | None:
        """Images that all cores of a node together read, decode and augment; None where unknown."""
        return None if self.core_images_per_second is None else self.cores_per_node * self.core_images_per_second

    @property
    def faster_precision(self) -> Precision:
        """What a plan's ``auto`` becomes on this machine."""
        return "bf16" if self.peak_tflops.bf16 >= self.peak_tflops.fp32 else "fp32"

    def seconds(self, operations: Operations) -> float:
        """How long a device takes for operations, one after the other."""
        return sum(self.parts(operations).values())

    def parts(self, operations: Operations) -> dict[str, float]:
        """The same time by limiting factor: ``products``, ``memory``, ``starting operations``.

        A GPU computes while the process starts the next operations, so only the excess counts; a CPU does both itself.
        """
        found = {PRODUCTS: 0.0, MEMORY: 0.0, STARTING: 0.0}
        for operation, count in operations.items():
            products = self._product_seconds(operation)
            memory = self.copy_seconds(operation.bytes)
            found[PRODUCTS if products > memory else MEMORY] += count * max(products, memory)
            found[STARTING] += count * self.operation_seconds
        if self.device == "gpu":
            found[STARTING] = max(0.0, found[STARTING] - found[PRODUCTS] - found[MEMORY])
        return found

    def slowest(self, processes: int) -> float:
        """How many times as long as the mean device the slowest of some takes (Blom's estimate of the maximum)."""
        return math.exp(self.spread * NormalDist().inv_cdf((processes - 0.375) / (processes + 0.25)))

    def move_seconds(self, moved_bytes: float) -> float:
        """How long a device takes to read and write bytes of its memory, in place and in order."""
        return moved_bytes / (self.memory_gigabytes_per_second * 1e9)

    def copy_seconds(self, moved_bytes: float) -> float:
        """How long a device takes to move bytes between tensors of a layer's size."""
        return self.move_seconds(moved_bytes) / self.memory_share

    def _product_seconds(self, operation: Operation) -> float:
        if not operation.flops:
            return 0.0
        peak = self.peak_flops(operation.precision)
        if operation.kind == "attention":
            rate = peak * float(getattr(self.attention_share, operation.precision))
            return operation.flops / (rate * (reached(*operation.shape) if operation.shape else 1.0))
        rate = peak * float(getattr(self.product_share, operation.precision))
        if self.multiprocessors is None or not operation.shape:
            return operation.flops / rate
        return product_seconds(
            *operation.shape,
            multiprocessors=self.multiprocessors,
            flops_per_second=rate,
            bytes_per_second=self.memory_gigabytes_per_second * 1e9,
        )


def load_hardware(name: str) -> HardwareConfig:
    """Reads a machine.

    Args:
        name: Of a file of ``configs/hardware``, without its ending, or the path of a YAML file.

    Raises:
        PlanError: The file is not what it should be.
        UserError: There is no such file.
    """
    paths = (
        [Path(name)] if name.endswith((".yaml", ".yml")) else [folder / f"{name.lower()}.yaml" for folder in FOLDERS]
    )
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        known = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
        raise UserError(
            f"--hardware: got {name!r}, which is no file; allowed are {', '.join(known)} or the path of a YAML file; "
            "name one of them, or measure this machine with `omnivl measure FILE`"
        )
    read: HardwareConfig = load_section(found, HardwareConfig)
    return read
