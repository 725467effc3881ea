"""What ZeRO keeps of gradients and parameters between steps, and how to reach it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.collectives import broadcast_from_first
from omnivl.model.chain import Chain


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


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter or buffer as the model was built with it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def gathered(layer: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Makes all parameters of a layer whole while the block runs. Called by every replica.

    Args:
        layer: One layer of the chain, so that no more than a layer is whole at once.
        write: Take over, on every replica, what replica 0 writes into the parameters.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0 if write else None):
        yield


def read_whole(chain: Chain, *, keep: bool) -> dict[str, Tensor]:
    """Copies of all parameters and buffers on the CPU, gathered layer by layer. Called by every replica.

    Args:
        chain: Under any ZeRO stage.
        keep: Whether this replica wants the result; others take part and return nothing.
    """
    whole: dict[str, Tensor] = {}
    for name, layer in chain.named_children():
        with gathered(layer):
            if keep:
                found = layer.state_dict(prefix=f"{name}.")
                whole |= {key: tensor.detach().cpu().clone() for key, tensor in found.items()}
    return whole


@torch.no_grad()
def write_whole(chain: Chain, weights: Mapping[str, Tensor] | None, names: frozenset[str]) -> None:
    """Copies replica 0's weights into the chain of every replica. Called by every replica.

    Args:
        chain: Under any ZeRO stage.
        weights: Whole weights on replica 0, ignored elsewhere.
        names: Which of them to copy; all fit.
    """
    for name, layer in chain.named_children():
        with gathered(layer, write=True):
            held = layer.state_dict(prefix=f"{name}.")
            for key in held.keys() & names if weights is not None else ():
                assert weights is not None
                held[key].copy_(weights[key])
        partitioned = {f"{name}.{key}" for key, parameter in layer.named_parameters() if hasattr(parameter, "ds_id")}
        for key, tensor in layer.state_dict(prefix=f"{name}.").items():
            if key not in partitioned:
                broadcast_from_first(tensor)
