"""Runs of the golden plans through the command line, and the recorded part of their results.

The engine is not imported: a run is started as a user starts it and read from its files (``metrics.jsonl``,
``weights.safetensors``), so that moving modules does not affect records.
"""

import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import starmap, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import patience
import torch
from safetensors.torch import load_file

from omnivl.chain.names import current_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORDED = HERE / "recorded"

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One plan on one host; it holds a record for each of the plan's models."""

    plan: str
    host: str
    models: Sequence[str]
    long: bool = False
    """Whether only ``make test-full`` compares it: ``make test`` has the other model under its host, and its model
    under another host."""

    @property
    def cases(self) -> list[tuple[str, str]]:
        return [(model, self.host) for model in self.models]


_TWO = ("launch.processes=2",)
HOSTS: Mapping[str, Sequence[str]] = {
    "plain": (),
    "zero3": (
        "parallel.host=zero",
        "parallel.zero_stage=3",
        "launch.processes=2",
        "batch.gradient_accumulation_steps=1",
    ),
    "pipeline": ("parallel.host=pipeline", "parallel.zero_stage=1", "launch.processes=2"),
}
"""What is laid over a plan: eight samples a step on each host."""

TOWERS = ("towers", "mome", "limoe", "mome_limoe", "attribute")
UNIFIED = ("unified", "unified_limoe", "unified_attribute")
RUNS = (
    Run("towers", "plain", TOWERS),
    Run("towers", "zero3", TOWERS),
    Run("towers", "pipeline", TOWERS),
    Run("unified", "plain", UNIFIED),
    Run("unified", "zero3", UNIFIED, long=True),
    Run("unified", "pipeline", UNIFIED, long=True),
)

ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Hold torch to older instructions: with them one machine imitates another."""

MOVE = 1e-2
"""Elements smaller than this count as so large: biases start at zero, and training moves them by little more."""

LIMITS = {
    "gradient_norm": 5e-6,
    "tensor losses.heads.univlc.queue.visual": 1e-5,
    "tensor losses.heads.univlc.queue.text": 1e-5,
}
"""Where another machine may be off by more than ``LIMIT``: the norm sums squares of small differences of large numbers,
and the queue holds directions of embeddings that lie close together as long as so little is learnt."""

LIMIT = 1e-6
"""Relative to the record, for losses, metrics and weights. With instructions held to AVX2 (``ISA_VARIABLES``) losses,
metrics and weights came out within 4e-7 of the record, gradient norms within 1.1e-6, queues within 2.4e-6."""

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LIBRARIES = ("torch", "deepspeed", "numpy", "pillow", "opencv-python-headless")


def carry_out(run: Run, folder: Path, limit: float = 150) -> dict[str, Record]:
    """Starts ``omnivl pretrain`` and returns the record of every model.

    Args:
        run: Which.
        folder: Where it works; the run folder is made below it.
        limit: Seconds after which it counts as hung.
    """
    plan = HERE / "plans" / f"{run.plan}.yaml"
    command_line(["pretrain", str(plan), *HOSTS[run.host], "--run-folder", "run"], folder, limit)
    stages = [folder / "run" / "stages" / f"{number:02d}-{model}" for number, model in enumerate(run.models, 1)]
    return {model: read_record(stage) for model, stage in zip(run.models, stages, strict=True)}


def command_line(arguments: Sequence[str], folder: Path, limit: float = 150) -> str:
    """Runs ``omnivl`` from a folder and returns what it printed; whatever hangs is killed."""
    process = start(arguments, folder)
    try:
        output, _ = patience.communicate(process, limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"omnivl {' '.join(arguments)} ended with {process.returncode}:\n{output[-6000:]}"
    return output


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Starts ``omnivl`` from a folder, on the CPU, with one thread for each process."""
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        env=_environment(),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_record(stage: Path) -> Record:
    """What is recorded of a stage: every figure of every step but times, and what each tensor of the weights is."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [dict(_flat({**line, "speed": {}})) for line in lines if line["event"] == "train"]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "a line for each step"
    names = sorted({name for step in steps for name in step} - {"step", "event"})
    weights = load_file(stage / "weights.safetensors")
    return {
        "machine": fingerprint(),
        "figures": {name: [step.get(name) for step in steps] for name in names},
        "tensors": {name: describe(weights[name]) for name in sorted(weights)},
    }


def describe(tensor: torch.Tensor) -> list[Any]:
    """``[hash of the bytes, shape, norm, sum, product with a fixed vector]``, the figures in fp64."""
    content = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    values = tensor.double().flatten().numpy()
    figures = (math.sqrt(float(values @ values)), float(values.sum()), float(values @ _directions(values.size)))
    return [
        f"{tensor.dtype}:{content[:20]}".removeprefix("torch."),
        list(tensor.shape),
        *(float(f"{x:.12g}") for x in figures),
    ]


def fingerprint() -> dict[str, Any]:
    """What decides in which order a machine adds: where it is equal, results are equal to the bit."""
    return {
        **_processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: _version(name) for name in _LIBRARIES},
        "threads_per_process": int(_environment()["OMP_NUM_THREADS"]),
        **{name: os.environ[name] for name in ISA_VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def record_file(model: str, host: str) -> Path:
    return RECORDED / f"{model}-{host}.json"


_LINE = ",\n"


def write_record(path: Path, record: Record) -> None:
    """JSON with a line for each figure and each tensor, so that a difference can be read."""
    groups = []
    for group, entries in record.items():
        lines = ",\n".join(
            f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}" for name, entry in entries.items()
        )
        groups.append(f"{json.dumps(group)}:{{\n{lines}\n}}")
    path.write_text("{\n" + ",\n".join(groups) + "\n}\n", encoding="utf-8")


def read_recorded(path: Path) -> Record:
    """A record, its tensors (where it has any) under today's names."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    if "tensors" in record:
        record["tensors"] = {current_name(name): told for name, told in record["tensors"].items()}
    return record


def deviations(got: Record, expected: Record) -> dict[str, float]:
    """How far every figure (at its worst step) and every tensor is from the record, relative; 0 where bits are equal.

    A tensor's sum and product are set against its norm, since they may be nothing but cancellation. What is there on
    one side only, or has another shape, is infinitely far.
    """
    found: dict[str, float] = {}
    for name in {**expected["figures"], **got["figures"]}:
        ours, theirs = (side["figures"].get(name, []) for side in (got, expected))
        found[name] = max(starmap(_apart, zip_longest(ours, theirs)))
    for name in {**expected["tensors"], **got["tensors"]}:
        found[f"tensor {name}"] = _tensors_apart(got["tensors"].get(name), expected["tensors"].get(name))
    return found


def too_far(found: Mapping[str, float], *, to_the_bit: bool) -> list[str]:
    """Deviations beyond what is allowed, the largest first, in words."""
    beyond = {name: value for name, value in found.items() if value > (0 if to_the_bit else LIMITS.get(name, LIMIT))}
    return [f"{name} by {value:.1e}" for name, value in sorted(beyond.items(), key=lambda item: -item[1])]


def first_difference(got: Record, expected: Record) -> str:
    """The first step in which a figure differs in any bit, and which figures."""
    columns = {
        name: list(zip_longest(got["figures"].get(name, []), expected["figures"].get(name, [])))
        for name in sorted({**got["figures"], **expected["figures"]})
    }
    for step in range(max(map(len, columns.values()))):
        pairs = {name: column[step] for name, column in columns.items() if step < len(column)}
        told = [f"{name} {ours!r}, recorded {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
        if told:
            return f"first in step {step + 1}: " + "; ".join(told[:6]) + (f"; {len(told) - 6} more" if told[6:] else "")
    return "in no figure, in weights alone"


def _apart(ours: float | None, theirs: float | None) -> float:
    if ours == theirs:
        return 0.0
    if ours is None or theirs is None:
        return math.inf
    return abs(ours - theirs) / max(abs(theirs), 1.0)


def _tensors_apart(ours: list[Any] | None, theirs: list[Any] | None) -> float:
    if ours is None or theirs is None or ours[1] != theirs[1]:
        return math.inf
    if ours[0] == theirs[0]:
        return 0.0
    scale = max(theirs[2], MOVE * math.sqrt(math.prod(theirs[1])))
    return max(abs(one - other) / scale for one, other in zip(ours[2:], theirs[2:], strict=True))


def _flat(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in tree.items():
        pairs += _flat(value, f"{path}{name}: ") if isinstance(value, Mapping) else [(path + name, value)]
    return pairs


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {**kept, **own, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def _processor() -> dict[str, Any]:
    """Maker, family, model and vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.is_file() else []
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = sorted(flag for flag in known.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    named = {name: known.get(name, platform.machine()) for name in ("vendor_id", "cpu family", "model")}
    return {**named, "flags": flags}


@cache
def _vector() -> Any:
    return np.random.default_rng(0).random(1 << 20) * 2 - 1


def _directions(size: int) -> Any:
    assert size <= _vector().size
    return _vector()[:size]
