"""What a step of the pipeline reports, on every process, by one sum over all of them that is read once.

The last stage knows the scalars, and how they are called; that is the same in most steps. It sends a number that stands
for their names beside them, and the names themselves when a process does not know that number yet.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.hosts.pipeline.place import Place
from engine.step.report import StepAverages, StepScalars, counted

MOST_SCALARS = 4096
"""Room for scalars in the sum: processes that do not know their number have to agree on its size."""
_SQUARE, _NUMBER, _VALUES = 0, 1, 2
_EXACT = 1 << 24
"""Whole numbers below this are exact in fp32."""


class ScalarNames:
    """Names of scalars by the number that stands for them.

    The same numbers are known to all stages of a replica: they learn them together.
    """

    def __init__(self, place: Place) -> None:
        """Nothing is known yet."""
        self._place = place
        self._known: dict[int, tuple[str, ...]] = {}

    def of(self, number: int, own: Sequence[str] | None) -> tuple[str, ...]:
        """The names. Called by all stages of a replica, with the same number.

        Args:
            number: ``number_of(own)``.
            own: On the last stage, the names.
        """
        if number not in self._known:
            text = b"" if own is None else json.dumps(list(own)).encode()
            last, group = self._place.stages - 1, self._place.host_group
            size = torch.tensor([len(text)], dtype=torch.int64)
            dist.broadcast(size, group=group, group_src=last)
            content = torch.empty(int(size), dtype=torch.uint8)
            if own is not None:
                content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            dist.broadcast(content, group=group, group_src=last)
            self._known[number] = tuple(json.loads(content.numpy().tobytes()))
        return self._known[number]


class StepSums:
    """The sum of one step over all processes."""

    def __init__(self, collected: StepScalars, votes: Mapping[str, bool], place: Place, device: torch.device) -> None:
        """This process' share.

        Args:
            collected: Of the step's micro-batches, on the last stage.
            votes: What this process says; the same names on every process.
            place: This process'.
            device: Where it is summed up.

        Raises:
            ValueError: There are more than ``MOST_SCALARS`` scalars.
        """
        said = torch.tensor([float(one) for one in votes.values()], device=device)
        self._names: list[str] | None = None
        self._place = place
        self._sum = torch.zeros(_VALUES + MOST_SCALARS + len(said), device=device)
        self._votes = tuple(votes)
        self._sum[_VALUES + MOST_SCALARS :] = said
        if place.is_last:
            self._names, means = collected.means()
            if len(means) > MOST_SCALARS:
                raise ValueError(f"{len(means)} losses and metrics; a pipeline carries {MOST_SCALARS}")
            if self._place.replica == 0:
                self._sum[_NUMBER] = number_of(self._names)
            self._sum[_VALUES : _VALUES + len(means)] = means

    def add_up(self, square: Tensor) -> Tensor:
        """Sums up over all processes, without waiting.

        Args:
            square: This process' share of the square of the gradient's norm.

        Returns:
            The sum of the squares.
        """
        self._sum[_SQUARE] = square
        dist.all_reduce(self._sum)
        return self._sum[_SQUARE]

    def read(self, norm: Tensor, names: ScalarNames) -> StepAverages:
        """Waits for the sum and the norm of the gradients.

        Args:
            norm: Equal on every process; negative where a gradient was not finite.
            names: Of scalars that earlier steps had.
        """
        self._sum[_VALUES:] /= self._place.replicas
        *read, gradient_norm = torch.cat([self._sum, norm.reshape(1).to(self._sum)]).tolist()
        known = names.of(int(read[_NUMBER]), self._names)
        return StepAverages(
            dict(sorted(zip(known, read[_VALUES:], strict=False))),
            gradient_norm,
            counted(self._votes, read[_VALUES + MOST_SCALARS :]),
        )


def number_of(names: Sequence[str]) -> int:
    """A number from 1 that stands for these names, in this order."""
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "big") % (_EXACT - 1)
