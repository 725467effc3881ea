"""One process of a run that ``benchmarks.estimate`` compares with its estimate.

python -m benchmarks.estimate_process CASE.json RESULT.json

Measures this machine's profile together with the other processes, then trains and takes time and memory.
"""

import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import clear_peak, peak_bytes
from engine.estimate.hardware import HardwareConfig
from engine.estimate.layers import blank_batches
from engine.estimate.measure import hardware_yaml, measure_hardware
from engine.hosts import Host, replica_group
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from engine.plan.precision import dtype_of, with_precision
from engine.processes import ranks
from engine.processes.collectives import make_gather
from engine.processes.process_group import finish, join_process_group
from engine.run.stage_start import start_host
from engine.step.freeze import freeze_idle
from engine.telemetry.environment import resident_bytes
from omnivl.architectures.build import build_chain
from omnivl.data.batch import Batch
from omnivl.data.tokenizer import Tokenizer, load_tokenizer


def read_stage(
    plan: str, name: str, overrides: list[str], processes: int, hardware: HardwareConfig
) -> tuple[StagePlan, Tokenizer]:
    """A stage of a plan on a machine, with its image-text pairs alone: every step is then of one kind."""
    read = with_precision(load_plan(plan, overrides, processes), hardware.faster_precision)
    stage = read.stage(name)
    pairs = tuple(entry for entry in stage.data if entry.kind == "image_text")
    return replace(stage, data=pairs), load_tokenizer(read.tokenizer)


def train(stage: StagePlan, tokenizer: Tokenizer, steps: int) -> tuple[list[float], int]:
    """Seconds of each step but the first two, and the peak memory of this process above that at the start, in bytes."""
    base = resident_bytes()
    clear_peak()
    host, batches = started(stage, tokenizer)
    taken = []
    for step in range(steps + 2):
        if step == 2:
            clear_peak()  # excludes memory that only the start of a host needs
        ranks.barrier()
        began = time.perf_counter()
        host.step(batches, step)
        ranks.barrier()
        taken.append(time.perf_counter() - began)
    return taken[2:], peak_bytes() - base


def started(stage: StagePlan, tokenizer: Tokenizer) -> tuple[Host, list[Batch]]:
    """A host with fresh weights, and the blank batches of its steps."""
    device, batch = torch.device("cpu"), stage.batch
    torch.manual_seed(0)
    chain = build_chain(
        stage.model,
        stage.objectives,
        tokenizer.special,
        gather=make_gather(replica_group(stage.parallel)),
        compute_dtype=dtype_of(stage.parallel.precision),
    )
    freeze_idle(chain, stage.layouts())
    host = start_host(chain, stage, device)
    chain.train()
    batches = blank_batches(stage, tokenizer) * batch.gradient_accumulation_steps if host.takes_batches else []
    return host, batches


def main(case: Path, result: Path) -> None:
    """Measures, trains, writes the results."""
    wanted = json.loads(case.read_text())
    torch.set_num_threads(wanted["threads"])
    device = join_process_group(always=True)
    processes = ranks.world_size()
    before = measure_hardware(device, local_processes=processes, seconds=wanted["seconds"])
    stage, tokenizer = read_stage(wanted["plan"], wanted["stage"], wanted["overrides"], processes, before)
    # First a model of the same widths and few layers, so that imports and the setup of kernels are not counted.
    small = replace(stage.model, **wanted["small"])
    train(replace(stage, model=small), tokenizer, 1)
    gc.collect()
    taken, peak = train(stage, tokenizer, wanted["steps"])
    peaks = ranks.gather(peak, int)
    if ranks.rank() == 0:
        found = {"seconds": statistics.median(taken), "all": taken, "peaks": peaks, "hardware": hardware_yaml(before)}
        result.write_text(json.dumps(found))
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
