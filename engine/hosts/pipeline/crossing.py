"""What neighbouring pipeline stages send each other: states forwards, gradients and what is wanted backwards.

Sizes and names travel between hosts, so that no host waits for its device to learn them. The first state of each kind
of micro-batch crosses whole; the stage that receives it sees what its passes read, adds what the stages after it want
of what it passes on, and says so with the gradient. From then on only that crosses.
"""

import json

import torch
import torch.distributed as dist
from torch import Tensor

from engine.hosts.micro_batch import LayoutKey
from engine.hosts.pipeline.packing import Packed
from engine.hosts.pipeline.place import Place
from engine.hosts.pipeline.reads import Notes, Wanted

_NUMBERS = torch.int64


class Crossing:
    """The transfers of this process' stage with the stages before and after it."""

    def __init__(self, place: Place, device: torch.device) -> None:
        """Nothing is sent yet."""
        self._place, self._device = place, device
        self._wanted: dict[LayoutKey, Wanted] = {}
        self._told: set[LayoutKey] = set()

    def wanted(self, key: LayoutKey) -> Wanted | None:
        """Names that the next stages read of a state with this key; None while that is not known."""
        return self._wanted.get(key)

    def send_state(self, packed: Packed) -> None:
        """To the next stage."""
        header, words, raw = packed
        there = self._place.stage + 1
        sizes = torch.tensor([len(header), len(words), len(raw)], dtype=_NUMBERS)
        dist.send(sizes, group=self._place.host_group, group_dst=there)
        dist.send(header, group=self._place.host_group, group_dst=there)
        for content in (words.detach().view(torch.uint8), raw):
            if len(content):
                dist.send(content, group=self._place.pipe_group, group_dst=there)

    def receive_state(self) -> Packed:
        """From the previous stage; its words require a gradient."""
        there, sizes = self._place.stage - 1, torch.empty(3, dtype=_NUMBERS)
        dist.recv(sizes, group=self._place.host_group, group_src=there)
        of_header, of_words, of_raw = sizes.tolist()
        header = torch.empty(of_header, dtype=torch.uint8)
        dist.recv(header, group=self._place.host_group, group_src=there)
        words = torch.empty(of_words, dtype=torch.bfloat16, device=self._device)
        raw = torch.empty(of_raw, dtype=torch.uint8, device=self._device)
        for content in (words.view(torch.uint8), raw):
            if len(content):
                dist.recv(content, group=self._place.pipe_group, group_src=there)
        return header, words.requires_grad_(), raw

    def send_gradient(self, gradient: Tensor, key: LayoutKey, notes: Notes) -> None:
        """To the previous stage.

        Args:
            gradient: Of the words of a state that came from there.
            key: Of that state.
            notes: What this stage has read and made of a state with this key.
        """
        there = self._place.stage - 1
        if key not in self._told:
            self._told.add(key)
            wanted = sorted(notes.wanted(self._wanted.get(key, ())))
            names = torch.frombuffer(bytearray(json.dumps(wanted).encode()), dtype=torch.uint8)
            dist.send(torch.tensor([len(names)], dtype=_NUMBERS), group=self._place.host_group, group_dst=there)
            dist.send(names, group=self._place.host_group, group_dst=there)
        dist.send(gradient.contiguous().view(torch.uint8), group=self._place.pipe_group, group_dst=there)

    def receive_gradient(self, words: Tensor, key: LayoutKey) -> Tensor:
        """From the next stage.

        Args:
            words: Those of the state that was sent there.
            key: Of that state.
        """
        there = self._place.stage + 1
        if key not in self._wanted:
            size = torch.empty(1, dtype=_NUMBERS)
            dist.recv(size, group=self._place.host_group, group_src=there)
            names = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(names, group=self._place.host_group, group_src=there)
            self._wanted[key] = Wanted(json.loads(names.numpy().tobytes()))
        gradient = torch.empty_like(words)
        dist.recv(gradient.view(torch.uint8), group=self._place.pipe_group, group_src=there)
        return gradient
