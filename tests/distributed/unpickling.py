"""Has a worker fail wherever something is unpickled, by whomever."""

import multiprocessing.reduction
import pickle
import sys
from typing import Any

import torch.distributed.distributed_c10d as c10d


class UnpickledError(Exception):
    """Something was unpickled."""


def refuse_unpickling() -> None:
    """From here on until the end of this process."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnpickledError("something was unpickled")

    def no_class(event: str, args: tuple[Any, ...]) -> None:  # whichever name the unpickler had
        if event == "pickle.find_class":
            raise UnpickledError(f"{args} was unpickled")

    class Refusing(pickle.Unpickler):  # a class, as libraries that are imported later derive theirs from it
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            refuse()

    pickle.loads, pickle.load, pickle.Unpickler = refuse, refuse, Refusing  # type: ignore[assignment, misc]
    multiprocessing.reduction.ForkingPickler.loads = refuse  # type: ignore[assignment]
    assert c10d._unpickler is not Refusing, "torch keeps names of its own"
    c10d._unpickler = Refusing  # type: ignore[assignment, misc]
    sys.addaudithook(no_class)
