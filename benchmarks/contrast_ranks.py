"""One process of ``benchmarks.contrast``: RANK PROCESSES PAIRS SIZE TIMES FILE.

FILE is where the processes meet; ``alone``: the others do not exist, and other embeddings stand in for theirs.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import clear_peak, peak_bytes, status_bytes
from engine.processes.collectives import make_gather
from omnivl.chain.gather import Gather, LocalGather
from omnivl.objectives.contrast import pair_contrast
from omnivl.objectives.spread_keys import SpreadKeys


class Alone(LocalGather):
    """The first of many replicas. In place of the others' embeddings come its own with their numbers moved on."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def shift(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """What a ring would bring: unit embeddings of other directions, other identities."""
        embeddings = [one.roll(1, 1) if one.dtype == torch.float32 and one.dim() == 2 else one for one in tensors]
        arrived = [one + len(one) if one.dtype == torch.int64 else one.clone() for one in embeddings]
        return lambda: arrived


def contrasted(visual: Tensor, text: Tensor, numbers: Tensor, gather: Gather, ring: bool | None = None) -> float:
    """Loss and gradients of both directions, and how many nearest keys are the pair's."""
    scale = torch.tensor(20.0, requires_grad=True)
    found = pair_contrast(*SpreadKeys.both(visual, text, numbers, gather, ring), scale)
    loss: Tensor = (found[0].loss.mean() + found[1].loss.mean()) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    return float(found[0].nearest_is_positive.float().mean())


def main() -> None:
    """Prints JSON: CPU and wall seconds of each time, and bytes beyond embeddings and their gradients."""
    rank, processes, pairs, size, times = map(int, sys.argv[1:6])
    torch.set_num_threads(1)
    alone = sys.argv[6] == "alone"
    if not alone:
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[6]}", rank=rank, world_size=processes)
    gather = Alone(processes) if alone else make_gather()
    torch.manual_seed(rank)
    own = pairs // processes
    numbers = torch.arange(own) + rank * own
    visual = F.normalize(torch.randn(own, size), dim=-1)
    text = F.normalize(visual + 0.1 * torch.randn(own, size), dim=-1)
    few = [one[:64].clone().requires_grad_() for one in (visual, text)]
    contrasted(few[0], few[1], numbers[:64], LocalGather())  # what torch allocates once
    for one in (visual, text):
        one.requires_grad_().grad = torch.zeros_like(one)
    before = status_bytes("VmRSS")
    clear_peak()
    seconds, cpu, right = [], [], 0.0
    for _ in range(times):
        if not alone:
            dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        right = contrasted(visual, text, numbers, gather, True if alone else None)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    found = {"seconds": seconds, "cpu_seconds": cpu, "bytes": peak_bytes() - before, "nearest_is_pair": right}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
