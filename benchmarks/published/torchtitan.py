"""Llama 3.1 8B of torchtitan on eight H100 at 500 W: FSDP, two rows of 8,192 tokens, every second product recomputed.

Source: github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, table 1; what is recomputed:
    torchtitan/parallelisms/parallelize_llama.py (``_save_list``).
"""

from benchmarks.published.counted import Execution, machine, seconds
from benchmarks.published.decoder import llama
from benchmarks.published.table import Row
from engine.estimate.traffic import Cluster


def rows() -> list[Row]:
    """Without and with ``torch.compile`` of the blocks."""
    return [_row(5762, compiled=False), _row(6667, compiled=True)]


def _row(published: float, *, compiled: bool) -> Row:
    how = Execution(recomputed="every second product", compiled=compiled)
    cluster = Cluster(machine("h100-500w"), 1, 8)
    taken = seconds(llama(4096, 14336, 32, 2, 8192, how), cluster, 2, "zero", 3)
    note = f"{'compiled' if compiled else 'eager'}; every second product recomputed; 500 W, 2.4 TB/s"
    what = "torchtitan Llama 8B, 8 H100, 2 x 8,192 tokens a GPU"
    return Row(what, "tokens/s a GPU", published, 2 * 8192 / taken, note)
