"""One process of ``benchmarks.contrast``: RANK PROCESSES PAIRS SIZE TIMES FILE.

FILE is where the processes meet; ``alone``: the others do not exist, and what they would send is not there.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.measure import clear_peak, peak_bytes, status_bytes
from engine.processes.collectives import make_gather
from omnivl.objectives.tiles import SpreadKeys, softmax_contrast


def contrasted(visual: Tensor, text: Tensor, numbers: Tensor) -> float:
    """Loss and gradients of both directions, and how many nearest keys are the pair's."""
    scale = torch.tensor(20.0, requires_grad=True)
    images, texts = SpreadKeys.both(visual, text, numbers, make_gather())
    found = [softmax_contrast(query, numbers, keys, scale) for query, keys in ((visual, texts), (text, images))]
    loss: Tensor = (found[0].loss.mean() + found[1].loss.mean()) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    return float(found[0].nearest_is_positive.float().mean())


def main() -> None:
    """Prints JSON: CPU and wall seconds of each time, and bytes beyond embeddings and their gradients."""
    rank, processes, pairs, size, times = map(int, sys.argv[1:6])
    torch.set_num_threads(1)
    if sys.argv[6] == "alone":
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    else:
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[6]}", rank=rank, world_size=processes)
    torch.manual_seed(rank)
    own = pairs // processes
    numbers = torch.arange(own) + rank * own
    visual = F.normalize(torch.randn(own, size), dim=-1)
    text = F.normalize(visual + 0.1 * torch.randn(own, size), dim=-1)
    few = [one[:64].clone().requires_grad_() for one in (visual, text)]
    contrasted(few[0], few[1], numbers[:64])  # what torch allocates once
    for one in (visual, text):
        one.requires_grad_().grad = torch.zeros_like(one)
    before = status_bytes("VmRSS")
    clear_peak()
    seconds, cpu, right = [], [], 0.0
    for _ in range(times):
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        right = contrasted(visual, text, numbers)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    found = {"seconds": seconds, "cpu_seconds": cpu, "bytes": peak_bytes() - before, "nearest_is_pair": right}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
