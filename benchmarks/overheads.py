"""Cost of layouts, recomputation and checkpoints: two processes at equal work, all contenders in turns.

python -m benchmarks.overheads

Every layout trains the same chain on the same number of pairs per step, in the same micro-batches over the same
processes, so that the difference is the cost of the layout alone. A pipeline of S stages idles for (S - 1) of (M + S -
1) slots of M micro-batches; a process of it has whole micro-batches where a replica has a part of each, which is why
plain is also timed with half as many of twice the size. A checkpoint is timed within a window of steps: saved once
synchronously, saved once asynchronously, not saved.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.measure import Ratio, Spread, over, quartiles
from benchmarks.overheads_worker import CONTENDERS, LARGER, SAVING, WAYS, Sizes
from benchmarks.record import Options, Report, Table, main_of
from launcher.start.local import run_local

PROCESSES = 2


def run(options: Options) -> Report:
    """Lets the processes measure, and compares."""
    if options.device.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        sys.exit(
            f"overheads: got {torch.cuda.device_count()} GPU; {PROCESSES} processes want one each; use --device cpu"
        )
    if options.device.type == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ["OMP_NUM_THREADS"] = str(max(1, options.threads // PROCESSES))
    sizes = Sizes.of(options.quick)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, *(["--quick"] if options.quick else [])]
        if run_local("benchmarks.overheads_worker", arguments, PROCESSES) != 0:
            sys.exit("overheads: a process failed")
        found = json.loads((Path(folder) / "found.json").read_bytes())
    seconds: Mapping[str, Sequence[float]] = found["seconds"]
    ratios = [
        Ratio(f"{name} / plain, time of a step", over(seconds[name], seconds["plain"]))
        for name in CONTENDERS
        if name != "plain" and not name.endswith(", recomputed")
    ]
    ratios += [
        Ratio(f"{name} / {LARGER}, time of a step", over(seconds[name], seconds[LARGER]))
        for name in CONTENDERS
        if name.startswith("pipeline") and not name.endswith(", recomputed")
    ]
    ratios += [
        Ratio(
            f"{name} / not recomputed, time of a step", over(seconds[name], seconds[name.removesuffix(", recomputed")])
        )
        for name in CONTENDERS
        if name.endswith(", recomputed")
    ]
    ratios += [ratio for host in SAVING for ratio in _of_saves(host, seconds, found["pauses"], sizes)]
    return Report(
        "overheads",
        f"{PROCESSES} processes, preset tiny, bf16 activations, {sizes.pairs} image-text pairs a step in "
        f"{sizes.micro_batches} micro-batches whatever the layout; a checkpoint of {found['bytes'] / 1e6:.0f} MB in a "
        f"window of {sizes.window} steps.",
        ratios,
        [_layouts(seconds, found["dearest"], sizes), _saves(seconds, found["pauses"], sizes)],
        {"preset": "tiny", "processes": PROCESSES, **vars(sizes)},
    )


def _of_saves(
    host: str, seconds: Mapping[str, Sequence[float]], pauses: Mapping[str, Sequence[float]], sizes: Sizes
) -> list[Ratio]:
    without = seconds[f"{host}, {WAYS[0]}"]
    ratios = []
    for way in WAYS[1:]:
        name = f"{host}, {way}"
        lost = [(one - other) / (other / sizes.window) for one, other in zip(seconds[name], without, strict=True)]
        steps = [other / sizes.window for other in without]
        ratios += [
            Ratio(f"{name}: training stands still / a step", over(pauses[name], steps)),
            Ratio(f"{name}: time lost in all / a step", Spread.of(lost)),
            Ratio(f"{name} every {sizes.window} steps / without, time", over(seconds[name], without)),
        ]
    return ratios


def _layouts(seconds: Mapping[str, Sequence[float]], dearest: Mapping[str, float], sizes: Sizes) -> Table:
    """Time of a step beside the expected time of a pipeline, from the share of its slowest stage and the bubble."""
    rows = []
    for name in CONTENDERS:
        bubble, expected = "-", "-"
        if name in dearest:
            slots = sizes.micro_batches + PROCESSES - 1
            bubble = f"{(PROCESSES - 1) / slots:.3f}"
            expected = f"{dearest[name] * PROCESSES * slots / sizes.micro_batches:.2f}"
        ratios = [
            quartiles([one / other for one, other in zip(seconds[name], seconds[base], strict=True)])
            for base in ("plain", LARGER)
        ]
        rows.append([name, quartiles(seconds[name]), *ratios, bubble, expected])
    columns = ["layout", "seconds a step (quartiles)", "over plain", f"over {LARGER}", "bubble", "expected over that"]
    return Table("Layouts at equal work", columns, rows)


def _saves(seconds: Mapping[str, Sequence[float]], pauses: Mapping[str, Sequence[float]], sizes: Sizes) -> Table:
    rows = []
    for host in SAVING:
        for way in WAYS:
            name = f"{host}, {way}"
            pause = quartiles(pauses[name]) if name in pauses else "-"
            rows.append([name, quartiles(seconds[name]), pause])
    columns = ["window", "seconds (quartiles)", "training stands still, seconds (quartiles)"]
    return Table(f"A checkpoint within {sizes.window} steps", columns, rows)


if __name__ == "__main__":
    main_of("overheads", __doc__, run)
