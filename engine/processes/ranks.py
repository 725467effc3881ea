"""Collective operations of the stage loop over all processes of a run, independent of the host.

All functions work without a process group too: a run of one plain process has none.
"""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch.distributed as dist

from engine.processes import messages
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


def from_first(value: Result, kind: Any) -> Result:
    """Returns rank 0's ``value`` on every process. Called by every process.

    Args:
        value: Of that kind; ignored on every rank but 0.
        kind: What is sent, as ``engine.processes.messages`` names it.
    """
    if world_size() == 1:
        return value
    told: Result = messages.broadcast(value, kind)
    return told


def gather(value: Result, kind: Any) -> list[Result]:
    """Returns every process' ``value`` in the order of ranks. Called by every process.

    Args:
        value: Of that kind.
        kind: What is sent, as ``engine.processes.messages`` names it.
    """
    if world_size() == 1:
        return [value]
    return messages.gather(value, kind)


@overload
def on_first(action: Callable[[], object]) -> None: ...


@overload
def on_first(action: Callable[[], Result], kind: Any) -> Result: ...


def on_first(action: Callable[[], Any], kind: Any = None) -> Any:
    """Runs an action on rank 0 alone and returns its result on every process. Called by every process.

    Args:
        action: What is done.
        kind: The kind of its result, as ``engine.processes.messages`` names it. Without one the result stays on rank 0,
            and None is returned.

    Raises:
        UserError: The action's error, on every process: if only one raised it, the others would wait.
    """
    result: Any = None
    mistake: UserError | None = None
    if rank() == 0:
        try:
            result = action()
        except UserError as error:
            mistake = error
    if kind is None:
        result = None
    result_kind: Any = type(None) if kind is None else kind | None  # None where there is a mistake
    outcome = (None if mistake is None else str(mistake), result)
    said, result = from_first(outcome, tuple[str | None, result_kind])
    if said is not None:
        raise mistake or UserError(said)
    return result


def first_problem(key: str, problem: str | None, patience_seconds: float) -> str | None:
    """The problem of the lowest rank that has one, on every process; None if all are well.

    Called by every process after an action with collectives in which any of them may have failed: the others may still
    wait in a collective of that action, so none may be used here. They exchange texts through the rendezvous store.

    Args:
        key: The same on every process, and new in this run.
        problem: Why this process failed.
        patience_seconds: How long to wait for the others.

    Raises:
        TimeoutError: Some other process did not come here within ``patience_seconds``: it waits in a collective.
        ConnectionError: The process that holds the store has ended.
    """
    if world_size() == 1:
        return problem
    store = dist.distributed_c10d._get_default_store()
    keys = [f"omnivl/{key}/{one}" for one in range(world_size())]
    try:
        store.set(keys[rank()], problem or "")
        store.wait(keys, datetime.timedelta(seconds=patience_seconds))
        return next((text for one in keys if (text := store.get(one).decode(errors="replace"))), None)
    except dist.DistStoreError as error:
        raise TimeoutError(f"{key}: not every process has come through: {error}") from error
    except RuntimeError as error:
        raise ConnectionError(f"{key}: the process that holds the rendezvous store has ended: {error}") from error
