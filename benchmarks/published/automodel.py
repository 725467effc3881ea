"""Language models with experts of NeMo Automodel on H100: FSDP and expert parallelism in bf16, 4,096 tokens a row.

Balance is forced: the k-th choice of the t-th token is expert ``(t * top_k + k) % experts``, so that all choices of a
token lie on one process of these layouts, or on one node. The library of the exchange (DeepEP) sends a token once to
each process, between nodes once to each node, and copies it there.

Source: github.com/NVIDIA-NeMo/Automodel: docs/performance-summary.md of 2025-10-02, examples/benchmark/configs/
    {qwen3_moe_30b,gptoss_20b,gptoss_120b}_te_deepep.yaml, nemo_automodel/components/moe/layers.py
    (``FakeBalancedGate``, ``GroupedExpertsDeepEP._apply_bias``).
"""

from dataclasses import replace

import torch

from benchmarks.published.counted import Execution, machine, on_meta, seconds
from benchmarks.published.decoder import embedding, head
from benchmarks.published.routed import LENGTH, Sizes, routed_block
from benchmarks.published.table import Row
from engine.estimate.traffic import Cluster

QWEN_30B = Sizes(2048, 32, 4, 128, 768, 128, 8, 151936, 48, head_norms=True, joined_rotation=False)
GPT_OSS_20B = Sizes(2880, 64, 8, 64, 2880, 32, 4, 201088, 24, biases=True)
GPT_OSS_120B = replace(GPT_OSS_20B, experts=128, depth=36)


def rows() -> list[Row]:
    """The three without pipelines."""
    return [
        _row("Qwen3-30B-A3B", QWEN_30B, (8, 4, 16), 12040, Execution("cuDNN", "blocks")),
        _row("GPT-OSS-20B", GPT_OSS_20B, (8, 2, 16), 13058, Execution("FlexAttention")),
        _row("GPT-OSS-120B", GPT_OSS_120B, (64, 2, 4), 7626, Execution("FlexAttention")),
    ]


def _row(name: str, sizes: Sizes, machines: tuple[int, int, int], tokens: float, how: Execution) -> Row:
    """A run.

    Args:
        name: Of the model.
        sizes: Of the model.
        machines: GPUs, which are as many as experts are split over, rows of a micro-batch, micro-batches of a step.
        tokens: Published tokens a second on a GPU.
        how: It ran: norms and activations of experts are one kernel each, in GPT-OSS rotations too, the rest is eager.
    """
    gpus, batch, accumulated = machines
    block = routed_block(sizes, gpus, batch, how, copies=1)
    # FlexAttention computes whole blocks of 128 keys: a window of 128 lies in two.
    every_second = block
    if sizes.biases:
        every_second = routed_block(sizes, gpus, batch, replace(how, window=256), copies=1)
    layers = [*block.repeated((sizes.depth + 1) // 2, 0, 2), *every_second.repeated(sizes.depth // 2, 1, 2)]
    layers.sort(key=lambda one: int(one.done.layer))
    with on_meta():
        x = torch.zeros(batch, LENGTH, sizes.width, dtype=torch.bfloat16).requires_grad_()
    layers = [embedding(x, sizes.words), *layers, head(x, sizes.words, upcast=False)]
    cluster = Cluster(machine("h100", how.kernel), max(1, gpus // 8), min(8, gpus))
    step = seconds(layers, cluster, batch, "zero", 3, accumulated=accumulated, experts_over=gpus)
    what = f"NeMo Automodel {name}, {gpus} H100, {batch} x 4,096 tokens a GPU, x {accumulated}"
    note = "biases of experts in eager code" if sizes.biases else "blocks recomputed"
    note = f"balance is forced; {how.kernel}; {note}"
    return Row(what, "tokens/s a GPU", tokens, accumulated * batch * LENGTH / step, note)
