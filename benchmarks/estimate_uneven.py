"""One process of a run whose experts get uneven loads, for ``benchmarks.estimate``.

python -m benchmarks.estimate_uneven CASE.json RESULT.json

Steps with each load take turns in one run. Seconds are those in which the one thread of this process computes: other
programs on the same cores do not count, nor does waiting for the other process.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.estimate_process import read_stage, started
from engine.estimate.measure import hardware_yaml, measure_hardware
from engine.processes import ranks
from engine.processes.process_group import finish, join_process_group
from moe.routers.base import LinearRouter


class ForcedLoads:
    """Has every router send a share of the tokens to the first half of its experts, whatever it has learnt.

    Attributes:
        share: Of the tokens.
    """

    share = 0.5

    def install(self) -> None:
        """For all routers of this process."""
        learnt = LinearRouter.logits

        def forced(router: LinearRouter, x: Tensor, modality: Tensor) -> Tensor:
            logits = learnt(router, x, modality)
            tokens, experts = logits.shape
            place = torch.arange(tokens) * 0.6180339887 % 1.0  # evenly spread, in any run of tokens
            half = experts // 2
            first = place < self.share
            within = torch.where(first, place / self.share, (place - self.share) / max(1.0 - self.share, 1e-9))
            expert = (within * half).long().clamp_(max=half - 1) + torch.where(first, 0, half)
            return logits + 100.0 * torch.nn.functional.one_hot(expert, experts)

        LinearRouter.logits = forced  # type: ignore[method-assign, assignment]


def main(case: Path, result: Path) -> None:
    """Measures the machine, trains, writes the medians of the first process, which has the first half."""
    wanted = json.loads(case.read_text())
    loads = ForcedLoads()
    loads.install()
    torch.set_num_threads(1)
    device = join_process_group(always=True)
    processes = ranks.world_size()
    hardware = measure_hardware(device, local_processes=processes, seconds=wanted["seconds"], clock=time.thread_time)
    stage, tokenizer = read_stage(wanted["plan"], wanted["stage"], wanted["overrides"], processes, hardware)
    host, batches = started(stage, tokenizer)
    taken: dict[float, list[tuple[float, float]]] = {share: [] for share in wanted["shares"]}
    for number in range(wanted["steps"] + 1):
        for place, share in enumerate(taken):
            loads.share = share
            ranks.barrier()
            began, computing = time.perf_counter(), time.thread_time()
            host.step(batches, number * len(taken) + place)
            computing = time.thread_time() - computing
            ranks.barrier()
            if number > 0:  # the first ones set things up
                taken[share].append((computing, time.perf_counter() - began))
    if ranks.rank() == 0:
        medians = [[statistics.median(one) for one in zip(*steps, strict=True)] for steps in taken.values()]
        result.write_text(json.dumps({"medians": medians, "hardware": hardware_yaml(hardware)}))
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
