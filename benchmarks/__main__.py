"""Runs all benchmarks, or those that are named.

python -m benchmarks
python -m benchmarks loader step_flops --quick

Each runs in a separate process, so that threads, memory and process groups of one do not affect another, and a failure
ends only its own benchmark.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping

from benchmarks.record import ROOT, add_options

BENCHMARKS: Mapping[str, str] = {
    "towers": "the training step of the small towers against transformers' classes",
    "hosts": "the plain host against a bare PyTorch loop; ZeRO-1 and ZeRO-3 against plain",
    "overheads": "layouts, recomputation and checkpoints on two processes at equal work",
    "loader": "the loader against a bare decode loop",
    "step_flops": "achieved FLOP/s of a training step over the best bf16 matrix product",
    "experts": "sparse feed-forward layers against a dense one and against DeepSpeed's",
    "estimate": "memory and time of a step as estimated against measured, on one to four processes",
    "memory": "what a process holds at most under ZeRO-3, and what recomputation saves and costs",
    "scale": "what a step costs on 8 and 512 ranks and on an accelerator, counted on a CPU",
    "start": "what a stage's start costs on 8, 64 and 512 ranks, counted on a CPU",
    "contrast": "the contrastive loss of 65,536 and of 1,048,576 pairs: seconds and memory",
    "tasks": "downstream tasks on generated scenes: pretrained, from scratch, text alone, picture alone",
    "learning": "the joint plan against a bare CLIP at equal wall time, several seeds",
    "records": "recall on an unseen style for 1 to 30 CPU minutes, beside a bare CLIP at equal CPU time",
    "fillings": "dense, by modality, sparse and both in the feed-forward slot, several seeds",
    "sparse": "experts in the last and in every second block against dense layers, all names in every step",
    "router_losses": "sparse experts with none, some and all of their auxiliary losses, several seeds",
    "regimes": "decoupled training against joint from scratch and one-directional, at equal CPU time, several seeds",
}
"""Modules of this folder with a ``main_of``, in the order in which they run. A new benchmark is a file and a row."""


def main() -> int:
    """Returns 0 when all benchmarks ran to the end, whether or not they met their targets."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:<12} {what}" for name, what in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)} (default: all)")
    add_options(parser)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    shared = [f"--device={options.device}", f"--threads={options.threads}"]
    shared += ["--quick"] if options.quick else []
    if options.out is not None:
        out = options.out.resolve()  # relative in the recorded command if it is in the repository
        shared.append(f"--out={out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    failed = []
    for name in options.names or BENCHMARKS:
        sys.stdout.write(f"== {name}: {BENCHMARKS[name]}\n")
        sys.stdout.flush()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *shared], cwd=ROOT).returncode != 0:
            failed.append(name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
