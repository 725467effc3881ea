"""What a program computes, counted while a model of the same operations runs without memory, and the step that follows.

Shapes: B rows of a micro-batch, S positions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.estimate.activities import Copies
from engine.estimate.fused import count_passes
from engine.estimate.hardware import HardwareConfig, RateConfig, load_hardware
from engine.estimate.layers import accelerator_kernels
from engine.estimate.live import LivePeak
from engine.estimate.operations import STARTED, OperationCounter, Operations, weighted
from engine.estimate.step import estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.work import LayerSize, ModelWork, Pass
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.parallel import BatchConfig, HostName, ParallelConfig
from engine.plan.plan import StagePlan

FSDP = Copies(reduced=6.0, gathered=8.0, gathered_share=12.0, added_share=12.0)
"""Bytes that FSDP2 copies per element, or per four gathered bytes: a gather's result into parameters (bf16 read and
written), own weights into bf16 before it, gradients in fp32 before a reduction, and sums over micro-batches.

Source: torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, its copies around gathers and reductions."""

Recomputed = Literal["nothing", "blocks", "every second product"]
Kernel = Literal["FlashAttention-2", "FlashAttention in Triton", "cuDNN", "FlexAttention"]

OVER_FLASH_2: Mapping[Kernel, float] = {
    "FlashAttention-2": 1.0,
    "FlashAttention in Triton": 0.54,
    "cuDNN": 1.61,
    "FlexAttention": 0.86,
}
"""Rates of attention over FlashAttention-2's, forward and backward together.

Triton: 1.4 times as long forward (1.3 to 1.5), 2 times backward; arXiv 2307.08691, section 4.1. cuDNN: 600 and 518
TFLOP/s for 370 and 322 on an H100 at 8,192 keys and heads of 128; arXiv 2407.08608, figures 5 and 6. FlexAttention:
90 % forward, 85 % backward; pytorch.org/blog/flexattention [recalled]."""


@dataclass(frozen=True)
class Execution:
    """How a program runs its blocks.

    Attributes:
        kernel: Of its attention.
        recomputed: In the backward pass.
        compiled: Whether operations between products are joined, by a compiler or in kernels of a library.
        window: Positions at which attention looks that is no longer causal over all; None: causal.
    """

    kernel: Kernel = "FlashAttention-2"
    recomputed: Recomputed = "nothing"
    compiled: bool = False
    window: int | None = None


EAGER = Execution()
"""By FlashAttention-2, with nothing recomputed and nothing joined."""


@dataclass(frozen=True)
class Counted:
    """A counted layer.

    Attributes:
        done: Its pass.
        size: Its parameters.
    """

    done: Pass
    size: LayerSize

    def repeated(self, times: int, first: int = 0, step: int = 1) -> list["Counted"]:
        """As many layers of the same work."""
        return [replace(self, done=replace(self.done, layer=str(first + step * one))) for one in range(times)]


def counted(
    name: str, module: nn.Module, run: Callable[[], Tensor], how: Execution = EAGER, *, halved: bool = False
) -> Counted:
    """What a module does forward and backward, and its size.

    Args:
        name: Of the layer.
        module: On ``meta``.
        run: Its forward pass.
        how: The program runs it.
        halved: Whether weights, gradients and moments are kept in bf16; otherwise in fp32, and gathered in bf16.
    """
    for one in module.parameters():
        one.grad = None
    forward, backward = _directions(_recomputing(run, how.recomputed), compiled=how.compiled)
    if how.window is not None:
        forward, backward = (_windowed(one, how.window) for one in (forward, backward))
    elements = sum(one.numel() for one in module.parameters()) // (2 if halved else 1)
    size = LayerSize(elements, 0, 0, 0, 0, elements, 0, cast=0 if halved else elements)
    return Counted(Pass(name, forward, backward, *(0.0,) * 7, 0), size)


def started(name: str, kernels: int) -> Counted:
    """Kernels that a program starts one by one, on too few numbers to take longer than their start."""
    return Counted(Pass(name, {STARTED: float(kernels)}, {}, *(0.0,) * 7, 0), LayerSize(0, 0, 0, 0, 0, 0, 0))


def optimizer_kernels(module: nn.Module) -> int:
    """Kernels of AdamW where it works on one parameter after the other."""
    weights = [torch.empty_like(one, device="meta").requires_grad_() for one in module.parameters()]
    for one in weights:
        one.grad = torch.empty_like(one)
    optimizer = torch.optim.AdamW(weights, foreach=False)
    optimizer.step()  # the first step makes the moments
    with OperationCounter() as counter:
        optimizer.step()
    return int(sum(counter.found.values()))


def seconds(
    layers: Sequence[Counted],
    cluster: Cluster,
    batch: int,
    host: HostName,
    zero: int,
    *,
    accumulated: int = 1,
    experts_over: int = 1,
) -> float:
    """Of a step of counted layers.

    Args:
        layers: With what they do in one micro-batch.
        cluster: Where.
        batch: Samples of a micro-batch.
        host: That runs most like the program.
        zero: 3 or 1.
        accumulated: Micro-batches of a step.
        experts_over: Processes over which experts are split.
    """
    sizes = {one.done.layer: one.size for one in layers}
    work = ModelWork(
        tuple(one.done for one in layers),
        sizes,
        batch,
        ZeroSizes(50_000_000, 1, 1, 1),
        (LivePeak(0, 0, 0),),
        useful_flops=0.0,
        frames=1.0,
    )
    parallel = ParallelConfig(host=host, zero_stage=3 if zero == 3 else 1)
    batches = BatchConfig(micro_batch_size_per_gpu=batch, gradient_accumulation_steps=accumulated)
    stage = StagePlan("published", 1, (), (), parallel=parallel, batch=batches)
    copies = FSDP if host == "zero" else None
    return estimate_step(stage, work, cluster, expert_parallel=experts_over, copies=copies).seconds


def machine(name: str, kernel: Kernel = "FlashAttention-2") -> HardwareConfig:
    """A machine of ``configs/hardware`` with the rate of a kernel of attention."""
    hardware = load_hardware(name)
    share = hardware.attention_share
    return replace(hardware, attention_share=RateConfig(share.bf16 * OVER_FLASH_2[kernel], share.fp32))


def _directions(run: Callable[[], Tensor], *, compiled: bool) -> tuple[Operations, Operations]:
    with accelerator_kernels():
        return count_passes(run, fused=compiled)


def _recomputing(run: Callable[[], Tensor], recomputed: Recomputed) -> Callable[[], Tensor]:
    if recomputed == "nothing":
        return run

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(_every_second_product())  # type: ignore[no-untyped-call]

    def again() -> Tensor:
        options: dict[str, Any] = {} if recomputed == "blocks" else {"context_fn": contexts}
        made: Tensor = checkpoint(run, use_reentrant=False, preserve_rng_state=False, **options)
        return made

    return again


def _every_second_product() -> Callable[..., CheckpointPolicy]:
    """Keeps what attention and all products but the second, the fourth, ... of a block return, as torchtitan does."""
    seen: Counter[bool] = Counter()
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default

    def policy(context: Any, function: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if function is torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        else:
            kept = function is attention
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _windowed(operations: Operations, keys: int) -> Operations:
    """With attention of each query over so many keys."""
    made = [
        (
            {replace(one, flops=one.flops * keys / one.shape[0], shape=(keys, one.shape[1])): 1.0}
            if one.kind == "attention"
            else {one: 1.0},
            count,
        )
        for one, count in operations.items()
    ]
    return weighted(*made)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules and tensors that are made within the block have no memory."""
    with torch.device("meta"):
        yield
