"""Access to the parts of gradients and parameters that ZeRO keeps between steps."""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from engine.step.freeze import is_unread
from moe.experts.bank import ExpertBank
from moe.working import used_in


def held_alike(chain: nn.Module) -> list[Tensor]:
    """Parameters and buffers that every process holds whole: no share of ZeRO-3, no experts that are split."""
    banks = [module for module in chain.modules() if isinstance(module, ExpertBank) and module.exchange is not None]
    split = {id(parameter) for bank in banks for parameter in bank.parameters()}
    tensors = chain.state_dict(keep_vars=True).values()
    return [one for one in tensors if not hasattr(one, "ds_id") and id(one) not in split]


def forget_gradients(engine: Any) -> None:
    """Zeroes the gradient buffers that outlive a step. To be called before a step's first micro-batch.

    ZeRO-3 overwrites a parameter's gradient partition in the first micro-batch that brings a gradient and leaves it
    unchanged if none does: a layer that a step does not use would be updated by the gradient of an earlier step. The
    buffers of an offloaded optimizer behave in the same way in all stages. With zeroed buffers a missing gradient is a
    zero gradient, as under the plain host and ZeRO 0-2.
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
    """This process' part of a parameter under ZeRO-3."""
    partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    return partition.data


def gather_as_used(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Has ZeRO-3 gather parameters in the type to which every use casts them, which halves the bytes for bf16.

    What is computed does not change: a cast before the gather gives the same numbers as one after it.

    Args:
        parameters: Which of them are cast was not known yet.

    Returns:
        Those of which it is still not known: no step has used them, or not in this way.
    """
    for parameter in parameters:
        if (dtype := used_in(parameter)) not in (None, parameter.dtype):
            parameter.comm_dtype = dtype  # type: ignore[attr-defined]
    return [parameter for parameter in parameters if used_in(parameter) is None]


def skip_unread() -> None:
    """Has ZeRO-3 of this process leave out of its gathers what no step reads. May be called again."""
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    usual = coordinator.iter_params
    if getattr(usual, "skips_unread", False):
        return

    def read(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
        found: Iterable[nn.Parameter] = usual(module, recurse)
        return found if _Skipping.off else (one for one in found if not is_unread(one))

    read.skips_unread = True  # type: ignore[attr-defined]
    vars(coordinator)["iter_params"] = read


class _Skipping:
    """Whether ``everything_read`` is on."""

    off = False


@contextmanager
def everything_read(engine: Any) -> Iterator[None]:
    """Has ZeRO-3 gather all parameters of what is called, for evaluations. Entered by every replica."""

    def forget_order() -> None:
        """The recorded order of gathers, which holds for the same parameters only."""
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        if coordinator.is_complete_trace():
            coordinator._invalidate_trace()

    forget_order()
    _Skipping.off = True
    try:
        yield
    finally:
        _Skipping.off = False
        forget_order()
