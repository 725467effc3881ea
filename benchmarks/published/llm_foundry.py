"""MPTs of llm-foundry on eight H100: FSDP in bf16, 2,048 tokens a row, nothing recomputed, eager.

Source: github.com/mosaicml/llm-foundry, scripts/train/benchmarking: README.md (H100 80GB BF16, 8 GPUs, 2,048 tokens),
    sweep.sh (version v0.0.4, torch 2.0.1), submit_benchmarks.py (attention in Triton by default, norms in bf16). Which
    attention the H100 runs had is not said: a later version of the same file has FlashAttention-2.
"""

from benchmarks.published.counted import Execution, machine, seconds
from benchmarks.published.decoder import opt
from benchmarks.published.table import Row
from engine.estimate.traffic import Cluster

_HOW = Execution(kernel="FlashAttention in Triton")


def rows() -> list[Row]:
    """1 B and 7 B."""
    return [_row("1 B", 2048, 24, 16, 14, 45455), _row("7 B", 4096, 32, 32, 6, 10643)]


def _row(name: str, width: int, depth: int, heads: int, batch: int, published: float) -> Row:
    layers = opt(width, depth, heads, 50368, batch, 2048, _HOW)
    taken = seconds(layers, Cluster(machine("h100", _HOW.kernel), 1, 8), batch, "zero", 3)
    what = f"llm-foundry MPT {name}, 8 H100, {batch} x 2,048 tokens a GPU"
    return Row(what, "tokens/s a GPU", published, batch * 2048 / taken, f"eager; {_HOW.kernel} [assumed]")
