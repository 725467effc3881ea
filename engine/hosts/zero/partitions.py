"""What ZeRO keeps of gradients and parameters between steps, and how to reach it."""

from typing import Any

from torch import Tensor, nn


def forget_gradients(engine: Any) -> None:
    """Zeroes the gradient buffers that outlive a step. To be called before a step's first micro-batch.

    ZeRO-3 overwrites a parameter's gradient partition in the first micro-batch that brings a gradient and leaves it
    alone where none comes: a layer that a step does not use would be moved by the gradient of an earlier step. The
    buffers of an offloaded optimizer behave alike in all stages. Zeroed buffers make "no gradient" a zero gradient,
    which is what the plain host and ZeRO 0-2 take it for.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
    if engine.zero_offload_optimizer() is not None:
        for entry in optimizer.optimizer.param_groups:
            for parameter in entry["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        for accumulated in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
            accumulated.zero_()
        for partition in getattr(optimizer, "fp32_partitioned_groups_flat", ()):
            if partition.grad is not None:
                partition.grad.zero_()


def stored_partition(parameter: nn.Parameter) -> Tensor:
    """What this process stores of a parameter under ZeRO-3."""
    partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return partition.data
