"""What replicas send each other of the flat tensors in which ZeRO 1 and 2 lay the parameters of a group end to end.

Each replica moves an equal part of a flat tensor, in fp32. DeepSpeed sums all gradients on all replicas, although each
reads the sums of its part alone, and gathers the parts in fp32, although most parameters are cast wherever they are
used. Here stage 1 sums each part on the replica that moves it, which halves the bytes of gradients, and both stages
gather in bf16 what every use casts to bf16, which halves those of weights. What a step computes is the same to the bit
on two replicas; on more of them sums may be rounded in another order.

After such a gather the parameters are rounded, on all replicas alike. The parts that replicas move stay exact: they are
what is saved. ``FlatGathers.make_exact`` is for whoever reads whole parameters.

Shapes: R replicas, n elements of a part, c columns of parts that are sent at once.

Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 7; DeepSpeed 0.19, ``runtime/zero/stage_1_and_2.py``.
"""

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.hosts.zero.sizes import BUFFERS
from engine.processes.collectives import all_gather_rows, reduce_scatter_rows
from moe.working import copy_together, used_in

_LOW = torch.bfloat16


@dataclass(frozen=True)
class Flat:
    """A flat tensor of a ZeRO optimizer of stage 1 or 2.

    Attributes:
        whole: fp32 ``[R n]``: the parameters end to end, padding behind them.
        own: ``[n]``, this replica's part of it.
        master: ``[n]``, which the optimizer moves and DeepSpeed then copies to ``own``.
        parameters: In their order.
        group: The replicas.
    """

    whole: Tensor
    own: Tensor
    master: Tensor
    parameters: Sequence[nn.Parameter]
    group: dist.ProcessGroup

    @property
    def replicas(self) -> int:
        """R."""
        return dist.get_world_size(self.group)

    @property
    def replica(self) -> int:
        """Whose part is ``own``."""
        return dist.get_rank(self.group)

    def spans(self) -> list[tuple[nn.Parameter | None, int, int]]:
        """Where each parameter begins and ends, then the padding, if any."""
        found: list[tuple[nn.Parameter | None, int, int]] = []
        end = 0
        for parameter in self.parameters:
            begin, end = end, end + parameter.numel()
            found.append((parameter, begin, end))
        return found if end == len(self.whole) else [*found, (None, end, len(self.whole))]

    def cut(self, edges: Collection[int]) -> list[list[tuple[int, int]]]:
        """The pieces of each span between sorted ``edges``."""
        found, rest = [], [edge for edge in sorted(edges, reverse=True) if edge > 0]
        for _, begin, end in self.spans():
            pieces = []
            while begin < end:
                while rest and rest[-1] <= begin:
                    rest.pop()
                stop = min(end, rest[-1]) if rest else end
                pieces.append((begin, stop))
                begin = stop
            found.append(pieces)
        return found


def flats_of(zero: Any) -> list[Flat]:
    """The flat tensors of DeepSpeed's optimizer of stage 1 or 2, in the order of its groups."""
    assert not any(map(any, zero.round_robin_bit16_padding)), "no padding between parameters"
    return [
        Flat(
            whole=zero.bit16_groups_flat[index],
            own=zero.parallel_partitioned_bit16_groups[index][dist.get_rank(group)],
            master=zero.single_partition_of_fp32_groups[index],
            parameters=zero.round_robin_bit16_groups[index],
            group=group,
        )
        for index, group in enumerate(zero.real_dp_process_group)
    ]


class FlatReduction:
    """Reduces the gradients of ZeRO-1 at the end of a step: each part on the replica that moves it."""

    def __init__(self, zero: Any, flats: Sequence[Flat], bucket: int) -> None:
        """Has DeepSpeed's optimizer of stage 1 reduce in this way.

        Args:
            zero: The optimizer, which is not offloaded.
            flats: Its flat tensors.
            bucket: Elements of the largest buffer, unless there are ``BUFFERS``.
        """
        self._zero, self._flats = zero, flats
        self._sent = [_Sent(flat, bucket) for flat in flats]
        for sent, parameters in zip(self._sent, zero.params_in_partition, strict=True):
            assert sent.own_parameters == len(parameters)
        zero.process_gradients = lambda parameter, group: None  # DeepSpeed would allocate its bucket
        zero.reduce_gradients = self._reduce

    @torch.no_grad()
    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """Stands in for ``reduce_gradients``, which is called in the last micro-batch of a step."""
        zero = self._zero
        for index, (flat, sent) in enumerate(zip(self._flats, self._sent, strict=True)):
            zero.averaged_gradients[index] = self._reduced(flat, sent)
        zero._clear_param_grad_only()

    def _reduced(self, flat: Flat, sent: "_Sent") -> "_PartGradients":
        """The mean gradients of this replica's part."""
        replicas = dist.get_world_size(self._zero.dp_process_group)  # also of experts of which there are fewer copies
        found = torch.empty_like(flat.own)
        gradients = sent.gradients()
        for columns in sent.columns:
            begin, end = columns.bounds
            rows = torch.empty(flat.replicas * (end - begin), dtype=found.dtype, device=found.device)
            places, given = torch.split(rows, columns.sizes), [gradients[piece] for piece in columns.pieces]
            without = [place for place, piece in zip(places, given, strict=True) if piece is None]
            if without:
                torch._foreach_zero_(without)
                places = tuple(place for place, piece in zip(places, given, strict=True) if piece is not None)
            copy_together(places, [piece for piece in given if piece is not None])
            self._scatter(rows.div_(replicas), found[begin:end], flat)
        return _PartGradients(found, sent.own_sizes, padded=sent.own_parameters < len(sent.own_sizes))

    def _scatter(self, rows: Tensor, found: Tensor, flat: Flat) -> None:
        """Sums ``rows [R c]`` over the replicas; row r becomes replica r's ``found [c]``."""
        dtype = self._zero.communication_data_type
        if flat.replicas == 1:
            found.copy_(rows)
        elif dtype == found.dtype:
            reduce_scatter_rows(found, rows, group=flat.group)
        else:
            low = torch.empty_like(found, dtype=dtype)
            reduce_scatter_rows(low, rows.to(dtype), group=flat.group)
            found.copy_(low)


@dataclass(frozen=True)
class _Columns:
    """What lies in one buffer.

    Attributes:
        bounds: Begin and end of the columns of parts.
        pieces: By their numbers among all pieces of gradients, row by row.
        sizes: Of these.
    """

    bounds: tuple[int, int]
    pieces: list[int]
    sizes: list[int]


class _Sent:
    """How gradients lie in what is sent.

    Attributes:
        columns: Of each buffer.
        own_sizes: Sizes of the pieces of this replica's part.
        own_parameters: Number of parameters of which it has a piece; less than sizes where it is padded.
    """

    def __init__(self, flat: Flat, bucket: int) -> None:
        part, spans = len(flat.own), flat.spans()
        width = max(-(-part // BUFFERS), bucket // flat.replicas)
        bounds = [(begin, min(begin + width, part)) for begin in range(0, part, width)]
        cut = flat.cut([row * part + begin for row in range(flat.replicas) for begin, _ in bounds])
        self._cut = [
            (parameter, [end - begin for begin, end in pieces])
            for (parameter, _, _), pieces in zip(spans, cut, strict=True)
        ]
        self.columns = [_Columns(one, [], []) for one in bounds]
        for number, (begin, end) in enumerate(piece for pieces in cut for piece in pieces):
            columns = self.columns[begin % part // width]
            columns.pieces.append(number)
            columns.sizes.append(end - begin)
        first = part * flat.replica
        own = [
            (parameter, min(end, first + part) - max(begin, first))
            for parameter, begin, end in spans
            if begin < first + part and end > first
        ]
        self.own_sizes = [size for _, size in own]
        self.own_parameters = sum(parameter is not None for parameter, _ in own)

    def gradients(self) -> list[Tensor | None]:
        """All pieces of gradients; None where there is no gradient."""
        found: list[Tensor | None] = []
        for parameter, sizes in self._cut:
            if parameter is None or parameter.grad is None:
                found += [None] * len(sizes)
            else:
                found += torch.split(parameter.grad.reshape(-1), sizes)
        return found


class _PartGradients(list[Tensor]):
    """The gradients of a part, as DeepSpeed has them: by parameter, for their norm.

    Attributes:
        flat_partition: All of them, which DeepSpeed then takes as they are.
    """

    def __init__(self, found: Tensor, sizes: Sequence[int], *, padded: bool) -> None:
        super().__init__(torch.split(found, list(sizes)))
        self.flat_partition = found
        if padded:
            self[-1]._zero_padding = True  # type: ignore[attr-defined]


class FlatGathers:
    """Gathers the parts that replicas have moved, in bf16 where every use casts to that."""

    def __init__(self, zero: Any, flats: Sequence[Flat], bucket: int, exact: Collection[int]) -> None:
        """Has DeepSpeed's optimizer of stage 1 or 2 gather in this way.

        Args:
            zero: The optimizer.
            flats: Its flat tensors, some with more than one replica.
            bucket: Elements of the largest buffer.
            exact: Ids of parameters that are also read without a cast.
        """
        self._flats = [flat for flat in flats if flat.replicas > 1]
        self._bucket = bucket
        self._unknown = [one for flat in self._flats for one in flat.parameters if id(one) not in exact]
        self._low: set[int] = set()
        self._plans: list[_Exact | None] = [None for _ in self._flats]
        self._rounded: frozenset[int] = frozenset()
        zero.bit16_groups_flat = _Gathered(zero.bit16_groups_flat, self._gather)
        _gather_by_themselves()

    def learn(self) -> None:
        """Looks which parameters the steps so far have cast. Called by every replica after equal steps."""
        known = {id(one) for one in self._unknown if used_in(one) is not None}
        low = {id(one) for one in self._unknown if used_in(one) == _LOW}
        self._unknown = [one for one in self._unknown if id(one) not in known]
        self._low |= low
        for number, flat in enumerate(self._flats if low else ()):
            if low.intersection(map(id, flat.parameters)):
                self._plans[number] = _Exact.of(flat, self._low)

    def is_rounded(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is rounded now, so that its exact values are those of the parts alone."""
        return id(parameter) in self._rounded

    @torch.no_grad()
    def make_exact(self) -> None:
        """Makes whole parameters exact until the next step. Called by every replica."""
        for flat in self._flats:
            if any(map(self.is_rounded, flat.parameters)):
                flat.own.copy_(flat.master)
                all_gather_rows(flat.whole, flat.own, group=flat.group)
        self._rounded = frozenset()

    @torch.no_grad()
    def _gather(self) -> None:
        rounded: set[int] = set()
        for flat, exact in zip(self._flats, self._plans, strict=True):
            if exact is None:
                all_gather_rows(flat.whole, flat.own, group=flat.group)
                continue
            kept = exact.gathered(flat)
            self._gather_low(flat)
            exact.put(kept)
            rounded |= self._low.intersection(map(id, flat.parameters))
        self._rounded = frozenset(rounded)

    def _gather_low(self, flat: Flat) -> None:
        width, part = max(1, self._bucket // flat.replicas), len(flat.own)
        for begin in range(0, part, width):
            end = min(begin + width, part)
            rows = torch.empty(flat.replicas, end - begin, dtype=_LOW, device=flat.whole.device)
            own = rows[flat.replica].copy_(flat.own[begin:end])
            all_gather_rows(rows.view(-1), own, group=flat.group)
            flat.whole.view(flat.replicas, part)[:, begin:end].copy_(rows)


class _Exact:
    """The runs of a flat tensor that are sent in fp32 beside all of it in bf16, as there are few."""

    def __init__(self, flat: Flat, runs: Sequence[Sequence[tuple[int, int]]]) -> None:
        """``runs`` are those of each replica's part."""
        self._sizes = [[end - begin for begin, end in own] for own in runs]
        self._width = max(map(sum, self._sizes))
        self._places = [[flat.whole[begin:end] for begin, end in own] for own in runs]

    @classmethod
    def of(cls, flat: Flat, low: Collection[int]) -> "_Exact | None":
        """The runs of all but the parameters ``low``, by ids; None where it takes fewer bytes to send all in fp32."""
        part = len(flat.own)
        runs: list[list[tuple[int, int]]] = [[] for _ in range(flat.replicas)]
        for (parameter, _, _), pieces in zip(
            flat.spans(), flat.cut([part * row for row in range(flat.replicas)]), strict=True
        ):
            for begin, end in pieces if parameter is not None and id(parameter) not in low else ():
                own = runs[begin // part]
                if own and own[-1][1] == begin:
                    begin = own.pop()[0]
                own.append((begin, end))
        made = cls(flat, runs)
        return made if _LOW.itemsize * part + 4 * made._width < 4 * part else None

    def gathered(self, flat: Flat) -> list[Tensor]:
        """The runs of each replica, ``[R, width]``; before parts are rounded."""
        rows = torch.zeros(flat.replicas, self._width, dtype=flat.whole.dtype, device=flat.whole.device)
        if self._width > 0:
            own = rows[flat.replica]
            copy_together(self._parts(own, flat.replica), self._places[flat.replica])
            all_gather_rows(rows.view(-1), own, group=flat.group)
        return list(rows)

    def put(self, rows: Sequence[Tensor]) -> None:
        """Puts them in their places."""
        parts = [part for replica, row in enumerate(rows) for part in self._parts(row, replica)]
        copy_together([place for own in self._places for place in own], parts)

    def _parts(self, row: Tensor, replica: int) -> list[Tensor]:
        sizes = self._sizes[replica]
        return list(torch.split(row[: sum(sizes)], sizes)) if sizes else []


class _Gathered(list[Tensor]):
    """DeepSpeed's list of flat tensors, with the way in which they are gathered."""

    def __init__(self, tensors: Sequence[Tensor], gather: Callable[[], None]) -> None:
        super().__init__(tensors)
        self.gather = gather


def _gather_by_themselves() -> None:
    """Has the engines of stages 1 and 2 of this process gather ``_Gathered`` as it says. May be called again."""
    module = vars(importlib.import_module("deepspeed.runtime.zero.stage_1_and_2"))
    usual = module["all_gather_dp_groups"]
    if getattr(usual, "gathers_by_themselves", False):
        return

    def gather(groups_flat: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        if isinstance(groups_flat, _Gathered):
            groups_flat.gather()
        else:
            usual(groups_flat, *args, **kwargs)

    gather.gathers_by_themselves = True  # type: ignore[attr-defined]
    module["all_gather_dp_groups"] = gather
