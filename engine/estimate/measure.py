"""This machine's profile, measured: products, memory, the cost of starting operations, links between its processes.

All processes measure at the same time, as they compute at the same time in training, so that shared cores are shared
here too. Results are means over the processes.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.estimate.hardware import HardwareConfig, LinkConfig, RateConfig
from engine.estimate.operations import OperationCounter
from engine.plan.yaml import write_yaml
from engine.processes import ranks
from engine.processes.collectives import all_gather_rows, reduce_scatter_rows
from engine.telemetry.environment import describe_environment, memory_bytes, usable_cores
from engine.telemetry.peak import Clock, measured_peak

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LAYER = {"cpu": (1024, 384, 1536), "cuda": (16384, 1024, 4096)}  # rows, hidden and inner size of a layer's product
_DEPTH = 12  # layers whose results are held at the same time
_MESSAGES = (1024, 32 * 2**20)  # bytes of a small and a large message


Timed = Callable[[Callable[[], object]], float]
"""Median seconds of an action."""


def measure_hardware(
    device: torch.device, *, local_processes: int, seconds: float = 0.5, clock: Clock = time.perf_counter
) -> HardwareConfig:
    """Measures what one process has. Called by all processes of all machines; one alone has no links.

    Args:
        device: Where this process computes.
        local_processes: Processes on this machine.
        seconds: How long each figure may take.
        clock: Seconds while the device computes; links are always timed by ``time.perf_counter``. On a CPU with one
            thread ``time.thread_time`` leaves out what other programs take.

    Returns:
        The profile. Where machines have different numbers of processes, it takes each process for a machine.
    """
    per_machine = _per_machine(local_processes)
    timed = functools.partial(_median_seconds, device=device, seconds=seconds, clock=clock)
    peaks = {name: _mean(measured_peak(device, dtype, seconds, clock), device) for name, dtype in _DTYPES.items()}
    products = {name: _mean(_product_rate(device, dtype, timed), device) for name, dtype in _DTYPES.items()}
    attention = {name: _mean(_attention_rate(device, dtype, timed), device) for name, dtype in _DTYPES.items()}
    bandwidth = _mean(_stream_rate(device, timed), device)
    between = _mean(_layer_rate(device, timed), device)
    within, across = _links(device, per_machine, seconds)
    memory = memory_bytes()
    is_gpu = device.type == "cuda"
    return HardwareConfig(
        name=torch.cuda.get_device_name(device) if is_gpu else str(describe_environment(1)["cpu"]),
        device="gpu" if is_gpu else "cpu",
        memory_gib=(torch.cuda.mem_get_info(device)[1] if is_gpu else memory / local_processes) / 2**30,
        peak_tflops=RateConfig(**{name: peak / 1e12 for name, peak in peaks.items()}),
        product_share=RateConfig(**{name: min(1.0, products[name] / peaks[name]) for name in _DTYPES}),
        attention_share=RateConfig(**{name: min(1.0, attention[name] / peaks[name]) for name in _DTYPES}),
        memory_gigabytes_per_second=bandwidth / 1e9,
        memory_share=between / bandwidth,
        operation_seconds=_mean(_start_seconds(device, timed), device),
        processes_per_node=per_machine,
        within_node=within,
        between_nodes=across,
        overlaps=is_gpu,
        host_memory_gib=memory / 2**30,
        host_gigabytes_per_second=_mean(_host_rate(device, timed) if is_gpu else bandwidth, device) / 1e9,
        storage_gigabytes_per_second=1.0,
        cores_per_node=usable_cores(),
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else None,
    )


def hardware_yaml(hardware: HardwareConfig) -> str:
    """The file that ``load_hardware`` reads, with a comment that names its origin."""
    known = describe_environment(1)
    head = f"# Measured by `omnivl measure` on {known['cpu']}, torch {known['torch']}, {known['started']}.\n"
    return f"{head}# Storage is not measured.\n{write_yaml(_short(asdict(hardware)))}"


def _short(tree: dict[str, object]) -> dict[str, object]:
    """Numbers with four digits."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found[name] = _short(value)
        else:
            found[name] = float(f"{value:.4g}") if isinstance(value, float) else value
    return found


def _product_rate(device: torch.device, dtype: torch.dtype, timed: Timed) -> float:
    """Rate of a layer's products forward and backward, in FLOP/s: they are smaller than the best square one."""
    rows, hidden, inner = _LAYER[device.type]
    x, up = torch.randn(rows, hidden, device=device), torch.randn(inner, hidden, device=device)
    x, up, bias = x.to(dtype), up.to(dtype), torch.zeros(inner, device=device, dtype=dtype)
    grad = torch.randn(rows, inner, device=device).to(dtype)

    def products() -> None:
        F.linear(x, up, bias)
        grad @ up
        grad.t() @ x

    return 6.0 * rows * hidden * inner / timed(products)


def _attention_rate(device: torch.device, dtype: torch.dtype, timed: Timed) -> float:
    """Rate of fused attention over rows of 197 positions, forward and backward, in FLOP/s."""
    rows, positions = (16, 197) if device.type == "cpu" else (256, 197)
    query = torch.randn(rows, 6, positions, 64, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(query)

    def attend() -> None:
        torch.autograd.backward([F.scaled_dot_product_attention(query, query, query)], [grad])
        query.grad = None

    return 14.0 * query.numel() * positions / timed(attend)


def _stream_rate(device: torch.device, timed: Timed) -> float:
    """Bytes per second of adding to a large tensor in place, as the optimizer does."""
    one, other = torch.zeros(2, (2**26 if device.type == "cpu" else 2**28) // 4, device=device)
    return 3.0 * float(one.nbytes) / timed(lambda: one.add_(other))


def _layer_rate(device: torch.device, timed: Timed) -> float:
    """Bytes per second of what layers do between their products, forward and backward, memory for results included."""
    rows, _, width = _LAYER[device.type]
    x = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.ones(width, device=device, requires_grad=True)

    def layers() -> None:
        hidden = x
        for _ in range(_DEPTH):
            hidden = hidden + F.gelu(F.layer_norm(hidden, (width,), weight))
        torch.autograd.backward([hidden.sum()])
        x.grad = weight.grad = None

    with OperationCounter() as counter:
        layers()
    moved = sum(operation.bytes * count for operation, count in counter.found.items())
    return float(moved) / timed(layers)


def _start_seconds(device: torch.device, timed: Timed) -> float:
    """Seconds of an operation on a very small tensor, with its backward pass."""
    one = torch.zeros(8, device=device, requires_grad=True)

    def chain() -> None:
        x = one
        for _ in range(50):
            x = x * 1.0
        torch.autograd.backward([x.sum()])

    return timed(chain) / 102


def _host_rate(device: torch.device, timed: Timed) -> float:
    source = torch.zeros(2**26, device=device)
    target = torch.zeros(2**26, pin_memory=True)
    return source.nbytes / timed(lambda: target.copy_(source))


def _per_machine(local_processes: int) -> int:
    """Processes on each machine, the same on every process: 1 where machines differ."""
    everywhere = set(ranks.gather(local_processes, int))
    return local_processes if len(everywhere) == 1 and ranks.world_size() % local_processes == 0 else 1


def _links(device: torch.device, per_machine: int, seconds: float) -> tuple[LinkConfig, LinkConfig]:
    """The links within a machine and between machines; where all processes are of one kind, both are the same.

    Between machines, all processes of a machine send at the same time, each to its like on the others: so each has its
    share of the port.
    """
    processes = ranks.world_size()
    if processes == 1:
        alone = LinkConfig(1.0, 1.0, 0.0)
        return alone, alone
    if per_machine in (1, processes):
        link = _link(device, range(processes), seconds)
        return link, link
    starts = range(0, processes, per_machine)
    machines = [range(start, start + per_machine) for start in starts]
    likes = [range(index, processes, per_machine) for index in range(per_machine)]
    within, across = (_in_groups(device, groups, seconds) for groups in (machines, likes))
    return within, across


def _in_groups(device: torch.device, groups: Sequence[range], seconds: float) -> LinkConfig:
    """The link of groups that send at the same time, as a mean over all of them."""
    made = [(members, dist.new_group(list(members))) for members in groups]
    members, group = next(one for one in made if ranks.rank() in one[0])
    link = _link(device, members, seconds, group)
    dist.destroy_process_group(group)
    return link


def _link(device: torch.device, members: range, seconds: float, group: dist.ProcessGroup | None = None) -> LinkConfig:
    """A link, from the times of collectives: the bandwidth follows from the extra time of the large message.

    Args:
        device: Where this process computes.
        members: Ranks of the group's processes.
        seconds: How long each figure may take.
        group: Those processes; None for all.
    """
    processes = len(members)

    def gather(tensor: Tensor) -> None:
        all_gather_rows(tensor, tensor.chunk(processes)[members.index(ranks.rank())].clone(), group=group)

    def scatter(tensor: Tensor) -> None:
        reduce_scatter_rows(torch.empty_like(tensor.chunk(processes)[0]), tensor, group=group)

    def reduce(tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=group)

    latency, reduced = _collective(reduce, device, processes, seconds)
    rates = [_collective(action, device, processes, seconds)[1] for action in (gather, scatter)]
    # A sum is a gather behind a scatter, and sends twice as much.
    shares = [rate / (2 * reduced) for rate in rates]
    return LinkConfig(2 * reduced / 1e9, 1.0, latency / (2 * (processes - 1)), *shares)


def _collective(
    action: Callable[[Tensor], object], device: torch.device, processes: int, seconds: float
) -> tuple[float, float]:
    """Seconds of a collective on a small tensor; bytes per second of (n - 1) / n of a large one."""
    small, large = (_collective_seconds(action, size, device, processes, seconds) for size in _MESSAGES)
    size = (processes - 1) / processes * (_MESSAGES[1] - _MESSAGES[0])
    return small, size / max(1e-9, large - small)


def _collective_seconds(
    action: Callable[[Tensor], object], size: int, device: torch.device, processes: int, seconds: float
) -> float:
    """Mean seconds of one collective; the first process decides how often it is repeated."""
    tensor = torch.zeros(size // 4 // processes * processes, device=device)
    action(tensor)
    _wait(device)
    began = time.perf_counter()
    action(tensor)
    _wait(device)
    repeats = torch.tensor([max(3.0, min(200.0, seconds / (time.perf_counter() - began)))], device=device)
    dist.broadcast(repeats, 0)
    taken = []
    for _ in range(int(repeats.item())):
        began = time.perf_counter()
        action(tensor)
        _wait(device)
        taken.append(time.perf_counter() - began)
    return _mean(_median(taken), device)


def _median_seconds(action: Callable[[], object], device: torch.device, seconds: float, clock: Clock) -> float:
    """Median seconds of an action over some time."""
    action()
    _wait(device)
    taken: list[float] = []
    started = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        began = clock()
        action()
        _wait(device)
        taken.append(clock() - began)
    return _median(taken)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _mean(value: float, device: torch.device) -> float:
    """The mean over all processes, which go on together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total.item()) / dist.get_world_size()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
