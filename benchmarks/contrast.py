"""The contrastive loss over large batches on a CPU: seconds and memory of loss and gradients in both directions.

Two processes of one thread hold half of the pairs each. The largest batch is that of one of 512 replicas alone: its
pictures over the texts of all of them; other unit embeddings stand in for those that the others would send.

python -m benchmarks contrast
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Ratio, Spread, short
from benchmarks.record import ROOT, Options, Report, Table, main_of


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        pairs: Of the whole batch.
        size: Of the embeddings.
        processes: Over which it is spread.
        alone: Whether only the first of them exists.
    """

    pairs: int
    size: int
    processes: int = 2
    alone: bool = False

    def __str__(self) -> str:
        part = f"one of {self.processes} replicas" if self.alone else f"{self.processes} processes"
        return f"{self.pairs:,} pairs, size {self.size}, {part}"


CASES = (Case(65_536, 64), Case(65_536, 256), Case(1_048_576, 64, 512, alone=True))
QUICK = (Case(2_048, 64), Case(16_384, 64, 512, alone=True))


@dataclass(frozen=True)
class Found:
    """What the process that took longest says.

    Attributes:
        cpu_seconds: Of each time.
        bytes: The most beyond embeddings and their gradients, of the process that had most.
    """

    cpu_seconds: Sequence[float]
    bytes: int


def measured(case: Case, times: int) -> Found:
    """Runs the processes of a case."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        meet = "alone" if case.alone else str(Path(folder) / "meet")
        ranks = range(1 if case.alone else case.processes)
        commands = [
            [
                *(sys.executable, "-m", "benchmarks.contrast_ranks"),
                *map(str, (rank, case.processes, case.pairs, case.size, times, meet)),
            ]
            for rank in ranks
        ]
        started = [
            subprocess.Popen(one, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for one in commands
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode != 0 for process in started):
        sys.exit(f"contrast: {case} failed")
    found = [json.loads(one.splitlines()[-1]) for one in said]
    slowest = max(found, key=lambda one: sum(one["cpu_seconds"]))
    return Found(slowest["cpu_seconds"], max(one["bytes"] for one in found))


def run(options: Options) -> Report:
    """Measures each case."""
    cases, times = (QUICK, 2) if options.quick else (CASES, 1)
    found = {case: measured(case, times) for case in cases}
    first = cases[0]
    ratios = [
        Ratio(f"CPU seconds, {first}", Spread.of(found[first].cpu_seconds), at_most=60),
        Ratio(f"GiB beyond embeddings, {first}", Spread.of([found[first].bytes / 2**30]), at_most=1),
    ]
    rows = [
        [
            *(f"{case.pairs:,}", str(case.size), "one of 512" if case.alone else "2"),
            *(short(Spread.of(one.cpu_seconds).median), short(one.bytes / 2**20)),
        ]
        for case, one in found.items()
    ]
    columns = ("pairs", "embedding", "processes", "CPU seconds of each", "MiB beyond embeddings and gradients")
    return Report(
        "contrast",
        " ".join((__doc__ or "").partition("\n\npython")[0].split()),
        ratios,
        [Table("Loss and gradients, both directions", columns, rows)],
        {"times": times},
    )


if __name__ == "__main__":
    main_of("contrast", __doc__, run)
