"""Compares estimates of ``omnivl estimate`` with measurements on this machine, on one to four processes.

python -m benchmarks.estimate

Every case is a layout. Its processes first measure the machine's profile at the same time, each on its share of the
cores; then they train a few steps on blank samples. The estimate uses the profile and the plan, not the steps. Memory
is the peak of a process in a step, minus its memory after steps of a model of the same widths and few layers. It is
measured in a separate run, in which freed memory is returned to the system at once, since that costs time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.estimate_process import read_stage
from benchmarks.measure import Ratio, Spread, short
from benchmarks.record import ROOT, Options, Report, Table, main_of
from engine.estimate.hardware import HardwareConfig, LinkConfig, load_hardware
from engine.estimate.report import device_of, estimate_stage, outlined
from engine.estimate.skew import experts_by_layer
from engine.estimate.traffic import Cluster
from engine.estimate.work import model_work

PLAN, STAGE = "configs/plans/emoji.yaml", "spatial"
MODEL: Mapping[str, Any] = {
    **{"hidden_size": 512, "num_heads": 8, "image_size": 64, "patch_size": 8, "projection_size": 256},
    **{"vision_layers": 6, "text_layers": 4, "alignment_layers": 2, "generation_layers": 1},
}
SMALL: Mapping[str, int] = {"vision_layers": 1, "text_layers": 1, "alignment_layers": 1, "generation_layers": 1}
_FREED_AT_ONCE: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MEMORY_WITHIN, TIME_WITHIN, SKEW_WITHIN = 0.10, 0.20, 0.05


@dataclass(frozen=True)
class Case:
    """A layout.

    Attributes:
        name: For the tables.
        processes: How many.
        parallel: Fields of the plan's section; the compute type is the machine's faster one.
        accumulation: Micro-batches of a step.
    """

    name: str
    processes: int
    parallel: Mapping[str, Any]
    accumulation: int = 1

    def overrides(self, micro_batch: int) -> list[str]:
        """Of the plan."""
        fields = {f"parallel.{name}": value for name, value in {**self.parallel, "precision": "auto"}.items()}
        fields |= {f"model.{name}": value for name, value in MODEL.items()}
        fields |= {
            f"stages.{STAGE}.batch.micro_batch_size_per_gpu": micro_batch,
            f"stages.{STAGE}.batch.gradient_accumulation_steps": self.accumulation,
        }
        return [f"{name}={value}" for name, value in fields.items()]


SHARES = (0.5, 0.625, 0.75, 0.875)
"""Of the tokens, that go to the first half of the experts, which the first of two processes has."""
UNEVEN: Mapping[str, Any] = {
    **{f"model.{name}": value for name, value in MODEL.items()},
    **{"model.hidden_size": 256, "model.vision_layers": 4, "model.text_layers": 1, "model.alignment_layers": 1},
    "model.ffn": "{kind: limoe, num_experts: 4, every: 1, router: {kind: token_choice}}",
    **{"parallel.host": "zero", "parallel.zero_stage": 1, "parallel.expert_parallel_size": 2},
    "parallel.precision": "auto",
    f"stages.{STAGE}.batch.gradient_accumulation_steps": 1,
}
"""Every feed-forward layer has experts. With the micro-batch below each gets about 2,000 rows of an image, so that rows
outweigh weights, and a CPU's kernel pads each load by 2 %."""
UNEVEN_BATCH = 62
CASES: Sequence[Case] = (
    Case("plain", 1, {"host": "plain"}),
    Case("plain", 2, {"host": "plain"}),
    Case("ZeRO-1", 2, {"host": "zero", "zero_stage": 1}),
    Case("ZeRO-2, two micro-batches", 2, {"host": "zero", "zero_stage": 2}, 2),
    Case("ZeRO-3", 2, {"host": "zero", "zero_stage": 3}),
    Case("pipeline of 2, four micro-batches", 2, {"host": "pipeline", "zero_stage": 1, "pipeline_stages": 2}, 4),
    Case("ZeRO-1", 4, {"host": "zero", "zero_stage": 1}),
    Case("ZeRO-3", 4, {"host": "zero", "zero_stage": 3}),
    Case("pipeline of 2 x 2, four micro-batches", 4, {"host": "pipeline", "zero_stage": 1, "pipeline_stages": 2}, 4),
)


def run(options: Options) -> Report:
    """Runs all cases, one after the other."""
    micro_batch, steps = (4, 2) if options.quick else (16, 7)
    rows, memory, seconds = [], [], []
    for case in CASES[:3] if options.quick else CASES:
        overrides = case.overrides(micro_batch)
        found = _measured(case, overrides, options, steps, {})
        peaks = _measured(case, overrides, options, 2, _FREED_AT_ONCE)["peaks"]
        hardware = _hardware(found["hardware"])
        stage, tokenizer = read_stage(PLAN, STAGE, overrides, case.processes, hardware)
        cluster = Cluster(hardware, 1, case.processes)
        estimate = estimate_stage(stage, tokenizer, cluster)
        memory.append(estimate.memory.peak / max(peaks))
        seconds.append(estimate.step.seconds / found["seconds"])
        rows.append(
            [
                *(case.name, str(case.processes)),
                *(f"{estimate.memory.peak / 2**20:,.0f}", f"{max(peaks) / 2**20:,.0f}", _error(memory[-1])),
                *(short(estimate.step.seconds), short(found["seconds"]), _error(seconds[-1])),
                estimate.limits,
            ]
        )
        sys.stdout.write("  ".join(rows[-1]) + "\n")
        sys.stdout.flush()
    head = ("layout", "processes", "MiB estimated", "measured", "error", "s estimated", "measured", "error", "limit")
    ratios = [
        Ratio("memory, estimated / measured", Spread.of(memory), 1 - MEMORY_WITHIN, 1 + MEMORY_WITHIN),
        Ratio("seconds of a step, estimated / measured", Spread.of(seconds), 1 - TIME_WITHIN, 1 + TIME_WITHIN),
    ]
    uneven, slowdown = _uneven(options, micro_batch if options.quick else UNEVEN_BATCH, steps)
    ratios.append(Ratio("slowdown by uneven experts, estimated / measured", slowdown, 1 - SKEW_WITHIN, 1 + SKEW_WITHIN))
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    settings = {"plan": PLAN, "stage": STAGE, "model": dict(MODEL), "micro_batch": micro_batch, "steps": steps}
    return Report("estimate", what, ratios, [Table("Fullest process and step", head, rows), uneven], settings)


def _uneven(options: Options, micro_batch: int, steps: int) -> tuple[Table, Spread]:
    """Steps with uneven experts over those with even ones, estimated and measured; and the ratios of both."""
    shares = SHARES[:2] if options.quick else SHARES
    overrides = [f"{name}={value}" for name, value in UNEVEN.items()]
    overrides.append(f"stages.{STAGE}.batch.micro_batch_size_per_gpu={micro_batch}")
    wanted = {
        **{"plan": PLAN, "stage": STAGE, "overrides": overrides, "shares": shares, "steps": steps},
        "seconds": 0.2 if options.quick else 0.6,
    }
    found = _run("estimate_uneven", 2, wanted, 1, {})
    at_once = LinkConfig(1e9, 1.0, 0.0)  # what the thread computes is compared, not what it waits for
    hardware = replace(_hardware(found["hardware"]), within_node=at_once, between_nodes=at_once)
    stage, tokenizer = read_stage(PLAN, STAGE, overrides, 2, hardware)
    cluster, chain = Cluster(hardware, 1, 2), outlined(stage, tokenizer)
    work = model_work(stage, tokenizer, 2, device_of(cluster))
    first = (0.0, 0.0, 0.0)
    rows: list[list[str]] = []
    ratios: list[float] = []
    for share, (computing, wall) in zip(shares, found["medians"], strict=True):
        load = np.repeat([share / 2, (1 - share) / 2], 2)
        loads = dict.fromkeys(experts_by_layer(chain), load)
        estimate = estimate_stage(stage, tokenizer, cluster, work=work, chain=chain, loads=loads).step.seconds
        first = first if rows else (estimate, computing, wall)
        slower = estimate / first[0], computing / first[1], wall / first[2]
        ratios.append(slower[0] / slower[1])
        rows.append(
            [
                f"{2 * share:.2f}",
                *(short(estimate), short(computing)),
                *(f"{slower[0]:.3f}", f"{slower[1]:.3f}", f"{ratios[-1] - 1:+.1%}"),
                f"{slower[2]:.2f}",
            ]
        )
        sys.stdout.write("  ".join(rows[-1]) + "\n")
        sys.stdout.flush()
    head = (
        *("heaviest / mean load", "s of computing estimated", "measured"),
        *("slowdown estimated", "measured", "error", "measured with all waiting"),
    )
    return Table("Uneven experts on two processes: the busier one", head, rows), Spread.of(ratios[1:])


def _hardware(text: str) -> HardwareConfig:
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "measured.yaml"
        profile.write_text(text)
        return load_hardware(str(profile))


def _error(ratio: float) -> str:
    return f"{ratio - 1:+.0%}"


def _measured(
    case: Case, overrides: Sequence[str], options: Options, steps: int, allocator: Mapping[str, str]
) -> dict[str, Any]:
    """Runs the processes of a case and returns their results."""
    threads = max(1, options.threads // case.processes)
    wanted = {
        **{"plan": PLAN, "stage": STAGE, "overrides": list(overrides), "small": dict(SMALL)},
        **{"threads": threads, "steps": steps, "seconds": 0.2 if options.quick else 0.6},
    }
    return _run("estimate_process", case.processes, wanted, threads, allocator)


def _run(
    module: str, processes: int, wanted: Mapping[str, Any], threads: int, allocator: Mapping[str, str]
) -> dict[str, Any]:
    """Runs the processes of a module of this folder and returns their results.

    Raises:
        RuntimeError: One of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "case.json", Path(folder) / "result.json"
        given.write_text(json.dumps(wanted))
        code = (
            "from launcher.start.local import run_local; import sys; "
            f"sys.exit(run_local('benchmarks.{module}', sys.argv[2:], int(sys.argv[1])))"
        )
        command = [sys.executable, "-c", code, str(processes), str(given), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", **allocator}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode != 0 or not result.is_file():
            raise RuntimeError(f"{module} on {processes} processes failed:\n{done.stderr[-4000:]}")
        read: dict[str, Any] = json.loads(result.read_text())
    return read


if __name__ == "__main__":
    main_of("estimate", __doc__, run)
