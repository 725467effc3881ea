"""Collective operations of the stage loop over all processes of a run, independent of the host.

All functions work without a process group too: a run of one plain process has none.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from omnivl.errors import UserError

Result = TypeVar("Result")


def rank() -> int:
    """This process' index among all processes of the run; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's ``value`` on every process. Called by every process.

    Args:
        value: Anything that pickles; ignored on every rank but 0.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every process' ``value`` in the order of ranks. Called by every process.

    Args:
        value: Anything that pickles.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(action: Callable[[], Result]) -> Result:
    """Runs an action on rank 0 alone and returns its result on every process. Called by every process.

    Raises:
        UserError: The action's error, on every process: if only one raised it, the others would wait.
    """
    outcome: Any = None
    mistake: UserError | None = None
    if rank() == 0:
        try:
            outcome = (True, action())
        except UserError as error:
            mistake, outcome = error, (False, str(error))
    succeeded, value = broadcast_object(outcome)
    if not succeeded:
        raise mistake or UserError(value)
    result: Result = value
    return result


def largest_over_ranks(value: int, device: torch.device) -> int:
    """Returns the largest ``value`` of any process, so that all make the same decision. Called by every process.

    Args:
        value: This process' value.
        device: Where the process group's backend expects its tensors.
    """
    if world_size() == 1:
        return value
    box = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())
