"""Shared memory for the frames of batches that is used again and again.

A data worker writes the frames of a batch into a slot, and the training process reads them there. The slot is free once
nothing holds the frames any more. Fresh shared memory for every batch would cost a page fault for each 4 KiB of it in
the worker, and one more in the training process.
"""

import math
import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where the frames of a batch lie, as it is sent to the training process.

    Attributes:
        owner: The worker that writes there.
        number: Among the slots of this worker.
        shape: Of the frames.
    """

    owner: int
    number: int
    shape: tuple[int, ...]


class Ring:
    """Slots of equal size, some for each worker. Picklable for processes that are started, not through queues.

    A worker takes a slot, the training process frees it: each byte that says whether a slot is taken is set by the one
    and cleared by the other, so that nobody waits. A worker that finds none takes fresh memory.
    """

    def __init__(self, owners: int, slots: int, slot_bytes: int) -> None:
        """Makes the memory; pages that are never written take no room.

        Args:
            owners: Workers.
            slots: Slots of each.
            slot_bytes: Bytes that a slot holds at least.
        """
        self._memory = new_shared((owners, slots, mmap.PAGESIZE * math.ceil(slot_bytes / mmap.PAGESIZE)))
        self._taken = new_shared((owners, slots)).zero_()

    def take(self, owner: int, shape: tuple[int, ...]) -> tuple[Tensor, Slot] | None:
        """Takes a slot for uint8 frames of a shape; None if all are taken or too small. For the owner alone."""
        size = math.prod(shape)
        free = np.flatnonzero(self._taken[owner].numpy() == 0)
        if size > self._memory.shape[2] or not len(free):
            return None
        number = int(free[0])  # the first one: its pages are there already
        self._taken[owner, number] = 1
        return self._memory[owner, number, :size].view(shape), Slot(owner, number, shape)

    def free(self, slot: Slot) -> None:
        """Lets the owner take the slot again."""
        self._taken[slot.owner, slot.number] = 0

    def frames(self, slot: Slot) -> Tensor:
        """The frames in a slot, which is freed when neither they nor a view of them exist any more."""
        held: NDArray[np.uint8] = self._memory[slot.owner, slot.number, : math.prod(slot.shape)].numpy()
        held = held.reshape(slot.shape)
        weakref.finalize(held, self.free, slot).atexit = False
        return torch.from_numpy(held)  # its storage holds the array


def new_shared(shape: tuple[int, ...]) -> Tensor:
    """New shared memory, uint8; torch's own ``default_collate`` gets its memory in the same way."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
