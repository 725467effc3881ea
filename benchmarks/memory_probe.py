"""Peak memory of one process by phase, minus its memory after a run of a model of few layers.

python -m benchmarks.memory_probe ARGUMENTS.json RESULT.json

Runs as one of the processes of a run, whose launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import clear_peak, peak_bytes, status_bytes
from engine.disk.weights_out import write_weights
from engine.hosts import create_host, layer_sharder
from engine.plan.parallel import ParallelConfig
from engine.processes.collectives import make_gather
from engine.processes.process_group import finish, join_process_group
from engine.step.freeze import freeze_idle
from engine.step.optimizer import OptimizerConfig
from engine.step.whole import whole_numel
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import Objective, UniVLC

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES: tuple[Objective, ...] = (UniVLC(),)
MODEL = OmniVL(
    hidden_size=512,
    num_heads=8,
    vision_layers=8,
    text_layers=8,
    alignment_layers=1,
    generation_layers=1,
    image_size=32,
    video_size=32,
    num_frames=2,
    text_length=16,
    vocab_size=8192,
    text_norm="pre",
    momentum=None,
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements, of which each takes four bytes.

    Attributes:
        trained: Parameters that are trained.
        resting: Parameters that are not: twins, and those that no step uses.
        largest: Parameters of the largest layer.
    """

    trained: int
    resting: int
    largest: int

    @classmethod
    def of(cls, chain: Chain) -> "Sizes":
        """The sizes of a chain, whole or sharded."""
        trained = sum(whole_numel(one) for one in chain.parameters() if one.requires_grad)
        layers = [sum(map(whole_numel, layer.parameters())) for layer in chain.layers]
        return cls(trained, sum(layers) - trained, max(layers))

    def rule(self, processes: int) -> int:
        """Bytes of one process: 16 of a trained parameter (it, its gradient, two moments), 4 of others, over all."""
        return (16 * self.trained + 4 * self.resting) // processes


def probe(
    parallel: dict[str, Any], model: dict[str, Any], *, by_layer: bool, steps: int, folder: str
) -> dict[str, Any]:
    """Builds, trains, saves a checkpoint, writes the whole weights; called by every process.

    Args:
        parallel: Fields of ``ParallelConfig``.
        model: Fields that replace those of ``MODEL``.
        by_layer: Whether the chain is sharded while it is being built, or built whole.
        steps: Optimizer steps.
        folder: Where files go.

    Returns:
        ``peaks``, the most bytes by phase (``build``, ``start`` of the host, ``steps``, ``checkpoint``, ``weights``);
        ``sizes``; and ``losses`` of the steps.
    """
    layout, config = ParallelConfig(**parallel), replace(MODEL, **model)
    peaks: dict[str, int] = {}
    # First a model of the same widths, so that imports, connections and the setup of kernels are not counted.
    small = replace(config, vision_layers=1, text_layers=1, alignment_layers=1, generation_layers=1)
    _run(layout, small, by_layer, 1, Path(folder), {}, 0)
    gc.collect()
    dist.barrier()
    chain, losses = _run(layout, config, by_layer, steps, Path(folder), peaks, status_bytes("VmRSS"))
    return {"peaks": peaks, "sizes": asdict(Sizes.of(chain)), "losses": losses}


def _run(
    layout: ParallelConfig,
    config: OmniVL,
    by_layer: bool,
    steps: int,
    folder: Path,
    peaks: dict[str, int],
    base: int,
) -> tuple[Chain, list[float]]:
    device = torch.device("cpu")
    dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
    tokens = SpecialTokens(0, 1, 2, 3, 4, vocab_size=config.vocab_size, num_reserved=5)
    with _peak(peaks, "build", base):
        torch.manual_seed(0)
        cut = layer_sharder(layout, device) if by_layer else None
        settle = None if cut is None else partial(_settle, cut)
        chain = build_chain(config, OBJECTIVES, tokens, gather=make_gather(), compute_dtype=dtype, settle=settle)
    with _peak(peaks, "start", base):
        freeze_idle(chain, [plan_layout(OBJECTIVES, "image_text", 1, 1)])
        host = create_host(
            layout, chain, OptimizerConfig(), OBJECTIVES, total_steps=1000, micro_batch_size=2, device=device
        )
    with _peak(peaks, "steps", base):
        losses = [host.step([_batch(config, step)], step).loss for step in range(steps)]
    with _peak(peaks, "checkpoint", base):
        (folder / "host").mkdir(exist_ok=True)
        shard = host.shard()
        shard.write(folder / "host", shard.placed())
        host.barrier()
    with _peak(peaks, "weights", base):
        write_weights(host, folder / "weights.safetensors", None)
    return chain, losses


def measure_processes(
    processes: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
    *,
    by_layer: bool,
    steps: int,
    folder: Path,
    passed: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs ``probe`` in some processes of this machine; returns the result of process 0.

    ``passed`` says whether their time is over, in which case they are killed.

    Raises:
        RuntimeError: A process failed or did not end in time; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"parallel": parallel, "model": model, "by_layer": by_layer, "steps": steps, "folder": str(folder)}
    (folder / "arguments.json").write_text(json.dumps(fields))
    command = [sys.executable, "-m", "benchmarks.memory_probe"]
    command += [str(folder / "arguments.json"), str(folder / "found.json")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        **{"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        # Freed memory is returned to the system at once, instead of being kept by the allocator.
        **{"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "PYTHONPATH": str(ROOT)},
    }
    running = []
    for rank in range(processes):
        with (folder / f"{rank}.log").open("wb") as log:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
    while any(one.poll() is None for one in running) and not passed():
        if any(one.poll() not in (None, 0) for one in running):
            break
        time.sleep(0.1)
    codes = [one.poll() for one in running]
    for one in running:
        one.kill()
        one.wait()
    if any(code != 0 for code in codes):
        raise RuntimeError(
            f"{codes}\n" + "\n".join((folder / f"{r}.log").read_text()[-3000:] for r in range(processes))
        )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def _settle(cut: Any, name: str, layer: ChainLayer) -> None:
    cut(layer)


def _batch(config: OmniVL, step: int) -> Batch:
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    pixels = (2, 1, 3, config.image_size, config.image_size)
    own = torch.arange(2) + 2 * dist.get_rank()
    words = torch.randint(5, config.vocab_size, (2, config.text_length), generator=draw)
    return Batch("image_text", torch.randint(0, 256, pixels, generator=draw, dtype=torch.uint8), words, own, own, own)


@contextmanager
def _peak(peaks: dict[str, int], phase: str, base: int) -> Iterator[None]:
    """Records the peak resident memory of this process within the block, minus ``base``."""
    dist.barrier()
    clear_peak()
    yield
    peaks[phase] = peak_bytes() - base
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group(always=True)
    found = probe(**json.loads(Path(sys.argv[1]).read_text()))
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    finish()
