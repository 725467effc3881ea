"""Mixtral 8x7B of Megatron-LM on 64 H100: four pipeline stages in eight pieces each, experts over eight processes.

Source: github.com/NVIDIA/Megatron-LM, megatron/core/transformer/moe/README.md: the parallel mapping of MCore v0.8 and
    the 468 TFLOP/s of MCore v0.9, which count all positions of causal attention. That loads are balanced and that
    nothing is recomputed is assumed.

This engine's pipeline is not interleaved: of the time in which its stages wait, an eighth is counted, as eight pieces
leave (Narayanan et al., arXiv 2104.04473, section 2.2). Its gradients are reduced after the last micro-batch,
Megatron's beside the computation.
"""

from dataclasses import replace
from itertools import pairwise

import torch

from benchmarks.published.counted import Execution, machine, on_meta
from benchmarks.published.decoder import embedding, head
from benchmarks.published.routed import LENGTH, Sizes, routed_block
from benchmarks.published.table import Row
from engine.estimate.live import LivePeak
from engine.estimate.step import estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.work import ModelWork
from engine.hosts.pipeline.division import divide
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.parallel import BatchConfig, ParallelConfig
from engine.plan.plan import StagePlan

MIXTRAL_8X7B = Sizes(4096, 32, 8, 128, 14336, 8, 2, 32000, 32)
_GPUS, _STAGES, _PIECES, _EXPERTS, _SAMPLES = 64, 4, 8, 8, 256
_TFLOPS = 468


def rows() -> list[Row]:
    """One."""
    how = Execution("cuDNN")
    block = routed_block(MIXTRAL_8X7B, _EXPERTS, 1, how, copies=MIXTRAL_8X7B.top_k)
    with on_meta():
        x = torch.zeros(1, LENGTH, MIXTRAL_8X7B.width, dtype=torch.bfloat16).requires_grad_()
    words = MIXTRAL_8X7B.words
    layers = [embedding(x, words), *block.repeated(MIXTRAL_8X7B.depth), head(x, words, upcast=True)]
    passes = tuple(replace(one.done, crossing=float(x.nbytes), crossing_gradient=float(x.nbytes)) for one in layers)
    sizes = {one.done.layer: one.size for one in layers}
    work = ModelWork(passes, sizes, 1, ZeroSizes(50_000_000, 1, 1, 1), (LivePeak(0, 0, 0),), 0.0, 1.0)
    accumulated = _SAMPLES * _STAGES // _GPUS
    parallel = ParallelConfig(host="pipeline", zero_stage=1, pipeline_stages=_STAGES, expert_parallel_size=_EXPERTS)
    batch = BatchConfig(micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulated)
    stage = StagePlan("published", 1, (), (), parallel=parallel, batch=batch)
    each = MIXTRAL_8X7B.depth // _STAGES
    ends = [0, *(1 + each * number for number in range(1, _STAGES)), len(layers)]
    cuts = [range(begin, end) for begin, end in pairwise(ends)]
    division = divide([(name, 0) for name in sizes], cuts, {name: size.trained for name, size in sizes.items()})
    cluster = Cluster(machine("h100", how.kernel), _GPUS // 8, 8)
    step = estimate_step(stage, work, cluster, expert_parallel=_EXPERTS, division=division)
    taken = step.seconds * (1 - step.bubble * (1 - 1 / _PIECES))
    published = _TFLOPS * 1e12 / model_flops(MIXTRAL_8X7B)
    return [
        Row(
            f"Megatron-LM Mixtral 8x7B, {_GPUS} H100, 1 x 4,096 tokens a GPU, x {accumulated}",
            "tokens/s a GPU",
            published,
            _SAMPLES * LENGTH / _GPUS / taken,
            "balance is assumed; cuDNN; pipeline of 4 x 8 pieces; gradients reduced at the end here",
        )
    ]


def model_flops(sizes: Sizes) -> float:
    """Of a token, forward and backward, as Megatron counts them: all positions of causal attention."""
    attention = 2 * sizes.width * sizes.head_size * (sizes.heads + sizes.kv_heads)
    experts = 3 * sizes.top_k * sizes.width * sizes.inner
    scores = 2 * LENGTH * sizes.heads * sizes.head_size
    return 6.0 * (sizes.depth * (attention + experts + scores) + sizes.width * sizes.words)
