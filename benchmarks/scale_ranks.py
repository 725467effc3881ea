"""One rank of ``benchmarks.scale``, the others of which do not exist: RANKS ZERO_STAGE STEPS OBJECTIVES."""

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale import NARROW, stage_of
from benchmarks.waits import WaitCounter
from engine.estimate.layers import blank_batches
from engine.hosts import create_host, layer_sharder
from engine.hosts.zero import sizes
from engine.plan.parallel import ZeroStage
from engine.processes.collectives import make_gather
from engine.step.freeze import freeze_idle, is_unread
from engine.step.whole import whole_numel
from omnivl.architectures.build import build_chain

LEAST_BUCKET = 2**10
"""Small enough that the narrow layers are gathered, and let go of, one by one, as those of ``base`` are."""
COUNTED = 3
"""The last steps, whose seconds count: the first ones record the order of the gathers."""


class GatherCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what is gathered of parameters.

    Attributes:
        bytes: In floating point numbers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks whether it gathers."""
        if func.namespace == "c10d" and "allgather_base" in func.overloadpacket.__name__:
            self.bytes += args[0].nbytes if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Takes the steps and prints what was found as the last line, JSON of ``scale.Found``."""
    ranks, zero_stage, steps = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes._LEAST = LEAST_BUCKET
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    stage, tokenizer = stage_of([*NARROW, sys.argv[4]])
    device = torch.device("cpu")
    parallel = replace(stage.parallel, zero_stage=cast("ZeroStage", zero_stage))
    shard = layer_sharder(parallel, device)
    chain = build_chain(
        stage.model,
        stage.objectives,
        tokenizer.special,
        gather=make_gather(),
        compute_dtype=torch.bfloat16,
        settle=None if shard is None else lambda _, layer: shard(layer),
    )
    freeze_idle(chain, stage.layouts())
    chain.train()
    batches = blank_batches(stage, tokenizer)
    host = create_host(
        parallel,
        chain,
        stage.optimizer,
        stage.objectives,
        total_steps=stage.steps,
        gradient_accumulation_steps=len(batches),
        micro_batch_size=stage.batch.micro_batch_size_per_gpu,
        device=device,
    )
    seconds = []
    for step in range(steps):
        began = time.process_time()
        host.step(batches, step)
        seconds.append(time.process_time() - began)
    with GatherCounter() as counted:
        host.step(batches, steps)
    with WaitCounter() as waits:
        host.step(batches, steps + 1)
    read = sum(whole_numel(one) for one in chain.parameters() if not is_unread(one))
    unread = sum(whole_numel(one) for one in chain.parameters() if is_unread(one))
    found = {"seconds": seconds[-COUNTED:], "gathered": counted.bytes, "read": read, "unread": unread}
    found |= {"waits": waits.found}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
