"""One process of ``benchmarks.overheads``: python -m benchmarks.overheads_worker FOLDER [--quick]."""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch

from benchmarks.hosts import build, costs_of, host_of, pairs
from benchmarks.measure import alternate
from engine.disk.checkpoint import SavedLayout, TrainerState
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.hosts import Host
from engine.hosts.pipeline.cut import cut
from engine.plan.parallel import ParallelConfig
from engine.processes import ranks
from engine.processes.process_group import join_process_group
from launcher.start.worker import end_process
from omnivl.architectures import OmniVL
from omnivl.data.batch import Batch

LAYOUTS = {
    "plain": ParallelConfig(host="plain"),
    "ZeRO-0": ParallelConfig(host="zero", zero_stage=0),
    "ZeRO-1": ParallelConfig(host="zero", zero_stage=1),
    "ZeRO-2": ParallelConfig(host="zero", zero_stage=2),
    "ZeRO-3": ParallelConfig(host="zero", zero_stage=3),
    "pipeline, ZeRO-0": ParallelConfig(host="pipeline", zero_stage=0, pipeline_stages=2),
    "pipeline, ZeRO-1": ParallelConfig(host="pipeline", zero_stage=1, pipeline_stages=2),
}
LARGER = "plain, larger micro-batches"
CONTENDERS = (*LAYOUTS, LARGER, *(f"{name}, recomputed" for name in ("plain", "ZeRO-3", "pipeline, ZeRO-1")))
SAVING = ("plain", "ZeRO-1")
"""Layouts whose checkpoints are timed."""
WAYS = ("not saved", "saved and waited for", "saved behind training")


@dataclass(frozen=True)
class Sizes:
    """Size of the measurement.

    Attributes:
        pairs: Image-text pairs of an optimizer step over all processes.
        micro_batches: Micro-batches of a step.
        window: Steps among which one checkpoint is saved.
        rounds: Rounds that count.
    """

    pairs: int
    micro_batches: int
    window: int
    rounds: int

    @classmethod
    def of(cls, quick: bool) -> Self:
        """Those of a quick run or of a full one."""
        return cls(16, 4, 2, 2) if quick else cls(32, 4, 4, 5)


def measure(folder: Path, sizes: Sizes) -> None:
    """Times every contender in turns; process 0 writes ``found.json``."""
    device = join_process_group(always=True)
    config = replace(OmniVL.presets["tiny"], vocab_size=4096)
    steps = {name: _step_of(name, config, sizes, device) for name in CONTENDERS}
    clocked: dict[str, Callable[[], float]] = {name: partial(_clock, step) for name, (_, step) in steps.items()}
    pauses: dict[str, list[float]] = {}
    for name in SAVING:
        host, step = steps[name]
        for way in WAYS:
            window = _Window(host, step, sizes.window, folder / name, way)
            clocked[f"{name}, {way}"] = window.run
            if way != WAYS[0]:
                pauses[f"{name}, {way}"] = window.pauses
    seconds = alternate(clocked, sizes.rounds, warmup=2)
    if ranks.rank() == 0:
        found = {
            "seconds": seconds,
            "pauses": {name: taken[-sizes.rounds :] for name, taken in pauses.items()},
            "dearest": {name: _dearest_stage(name, config) for name in LAYOUTS if name.startswith("pipeline")},
            "bytes": sum(file.stat().st_size for file in folder.glob("*/training/step-*/host/*")) // len(SAVING),
        }
        (folder / "found.json").write_text(json.dumps(found))


def _step_of(name: str, config: OmniVL, sizes: Sizes, device: torch.device) -> tuple[Host, Callable[[], object]]:
    larger = 2 if name == LARGER else 1
    layout = LAYOUTS["plain" if name == LARGER else name.removesuffix(", recomputed")]
    parallel, count = replace(layout, precision="bf16"), sizes.micro_batches // larger
    config = replace(config, recompute="block" if name.endswith(", recomputed") else "none")
    size = sizes.pairs // count // parallel.replicas(ranks.world_size())
    host = host_of(parallel, config, size, device, count)
    batches = [pairs(config, size)] * count
    return host, partial(_step, host, batches)


def _step(host: Host, batches: Sequence[Batch]) -> None:
    assert not host.step(batches, 0).skipped


def _clock(action: Callable[[], object]) -> float:
    """Seconds that all processes take for something."""
    ranks.barrier()
    start = time.perf_counter()
    action()
    ranks.barrier()
    return time.perf_counter() - start


class _Window:
    """Some steps with one checkpoint among them, or none.

    Attributes:
        pauses: Seconds for which training stood still, one for each run.
    """

    def __init__(self, host: Host, step: Callable[[], object], steps: int, folder: Path, way: str) -> None:
        self._host, self._step, self._steps, self._folder = host, step, steps, folder / way.split()[-1]
        self._saves = way != WAYS[0]
        self._writer = CheckpointWriter(self._folder, asynchronous=way == WAYS[2], keep_last=1)
        self.pauses: list[float] = []

    def run(self) -> float:
        """Seconds of the window. The checkpoint of an earlier run is removed before, not within it."""
        if ranks.rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        pauses: list[float] = []
        seconds = _clock(partial(self._go, pauses))
        self.pauses.append(sum(pauses))
        return seconds

    def _go(self, pauses: list[float]) -> None:
        for number in range(self._steps):
            self._step()
            if self._saves:
                start = time.perf_counter()
                if number == 0:
                    layout = SavedLayout("plain", None, ranks.world_size(), 1, 1)
                    self._writer.save(self._host, TrainerState(step=1, layout=layout), {})
                else:
                    self._writer.poll(self._writer.is_writing)
                if number == self._steps - 1:
                    self._writer.finish()
                pauses.append(time.perf_counter() - start)


def _dearest_stage(name: str, config: OmniVL) -> float:
    """Share of the operations in the stage that has most of them: 1 / S for an even cut."""
    costs = costs_of(build(config))
    parts = cut(costs, LAYOUTS[name].pipeline_stages)
    return max(sum(costs[index] for index in part) for part in parts) / sum(costs)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    measure(options.folder, Sizes.of(options.quick))
    return 0


if __name__ == "__main__":
    end_process(main)
