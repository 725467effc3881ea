"""Shared memory that is used again: only when nobody holds it any more."""

import gc

import numpy as np
import torch

from omnivl.data.ring import Ring, Slot

SHAPE = (2, 3, 4)


def test_a_slot_is_taken_until_its_frames_and_all_their_views_are_gone():
    ring = Ring(owners=2, slots=2, slot_bytes=100)
    taken = ring.take(1, SHAPE)
    assert taken is not None
    written, slot = taken
    assert slot == Slot(1, 0, SHAPE)
    written.copy_(torch.arange(24).view(SHAPE))
    frames = ring.frames(slot)
    assert torch.equal(frames, torch.arange(24, dtype=torch.uint8).view(SHAPE))
    assert ring.take(1, SHAPE)[1].number == 1
    assert ring.take(1, SHAPE) is None, "both are taken"
    assert ring.take(0, SHAPE)[1] == Slot(0, 0, SHAPE), "another worker has its own"
    part, array = frames[1:].flip(0)[0:1].view(-1), frames.numpy()
    view = frames[1:]
    del frames, part
    gc.collect()
    assert ring.take(1, SHAPE) is None, "a view and an array are left"
    del array
    assert ring.take(1, SHAPE) is None
    assert np.array_equal(view[0].numpy().ravel(), np.arange(12, 24))
    del view
    assert ring.take(1, SHAPE)[1].number == 0


def test_what_is_too_large_or_never_sent_takes_no_slot():
    ring = Ring(owners=1, slots=1, slot_bytes=4096)
    assert ring.take(0, (4097,)) is None
    _, slot = ring.take(0, (4096,))
    assert ring.take(0, (1,)) is None
    ring.free(slot)
    assert ring.take(0, (1,)) is not None


def test_frames_outlive_their_ring():
    ring = Ring(owners=1, slots=1, slot_bytes=10)
    written, slot = ring.take(0, (10,))
    written.fill_(7)
    frames = ring.frames(slot)
    del ring, written
    gc.collect()
    assert frames.tolist() == [7] * 10
