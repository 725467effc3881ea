"""Llamas of KempnerForge on H200 in nodes of four: FSDP in bf16, 4,096 tokens a row, all blocks recomputed.

Source: github.com/KempnerInstitute/KempnerForge, benchmarks/mfu_scaling: mfu_scaling_2026-04-05.md, mfu_bench.sh. Its
    MFU counts all parameters, those of the embedding too; tokens are compared here.
"""

from benchmarks.published.counted import Execution, machine, seconds
from benchmarks.published.decoder import llama
from benchmarks.published.table import Row
from engine.estimate.traffic import Cluster
from engine.plan.parallel import HostName


def rows() -> list[Row]:
    """On one, two, four and eight GPUs."""
    return [
        _row("7B", 4096, 32, 1, 1, (2, 4), 10471),
        _row("7B", 4096, 32, 2, 1, (2, 4), 18728 / 2),
        _row("7B", 4096, 32, 4, 1, (4, 2), 38983 / 4),
        _row("13B", 5120, 40, 8, 2, (4, 4), 35405 / 8),
    ]


def _row(name: str, width: int, depth: int, gpus: int, nodes: int, batches: tuple[int, int], published: float) -> Row:
    batch, accumulated = batches
    compiled, multiple = nodes == 1, 256
    inner = multiple * -(-int(1.3 * int(2 * 4 * width / 3)) // multiple)  # Llama's rule for its inner size
    how = Execution(recomputed="blocks", compiled=compiled)
    # 80.7 GB for 8 B parameters on one GPU: weights, gradients and moments are in bf16.
    layers = llama(width, inner, depth, batch, 4096, how, halved=gpus == 1)
    host: HostName = "zero" if gpus > 1 else "plain"
    taken = seconds(layers, Cluster(machine("h200"), nodes, gpus // nodes), batch, host, 3, accumulated=accumulated)
    what = f"KempnerForge Llama {name}, {gpus} H200, {batch} x 4,096 tokens a GPU, x {accumulated}"
    note = "compiled; blocks recomputed" if compiled else "eager; blocks recomputed; two nodes"
    return Row(what, "tokens/s a GPU", published, accumulated * batch * 4096 / taken, note)
