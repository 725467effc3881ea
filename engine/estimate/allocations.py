"""Memory of tensors, followed from its allocation until the last tensor that uses it is freed."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors that are made within the block, on any device and on ``meta``.

    Attributes:
        owner: Number under which new tensors are counted.
        live: Bytes that are allocated now.
        most: The most that were allocated at once.
        other: Bytes that the caller counts.
        most_with_other: The most of ``live`` and ``other`` together.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = 0
        self.live = self.most = self.most_with_other = self.other = 0
        self._known: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and follows the tensors that it makes."""
        given = {storage_number(one) for one in tensors_in((args, *(kwargs or {}).values()))}
        out = func(*args, **(kwargs or {}))
        for one in tensors_in((out,)):
            if storage_number(one) not in given:
                self._follow(one.untyped_storage())
        self.most = max(self.most, self.live)
        self.most_with_other = max(self.most_with_other, self.live + self.other)
        return out

    def held(self) -> dict[int, tuple[int, int]]:
        """Owner and bytes of every storage that is allocated, by its number."""
        return dict(self._known)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        number = int(storage._cdata)
        if number not in self._known:
            self._known[number] = self.owner, storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, number, storage.nbytes())

    def _forget(self, number: int, size: int) -> None:
        self._known.pop(number, None)
        self.live -= size


def storage_number(tensor: Tensor) -> int:
    """A number that identifies a tensor's memory as long as it is allocated."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
