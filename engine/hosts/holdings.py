"""All tensors of a host by parameter name, in a form that does not depend on their distribution over processes.

Weights, buffers, momentum twins and optimizer moments, fp32 but for frozen matrices of some stacks, each by its name in
the chain and its offset in the whole tensor. Every process writes a shard (``engine.hosts.shards``): tensors that only
it holds, and its share of tensors that other processes hold as well, so that nothing is gathered and the work is equal.
Every process reads the tensors that it holds, whichever host, ZeRO stage or number of processes wrote them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.hosts.base import WeightsReport
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.shards import Piece, Shard, make_shard, share
from engine.hosts.stores import WEIGHT, Run, Store
from engine.hosts.weights import agree_on_weights, match_weights
from engine.processes.collectives import broadcast_from_first
from engine.step.whole import whole_shape
from moe.experts.bank import ExpertBank
from moe.experts.exchange import ExpertExchange
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather


class Holdings:
    """Reads and writes all of a host's tensors. Every method is called by every replica."""

    def __init__(
        self,
        chain: Chain,
        store: Store,
        gather: Gather,
        group: dist.ProcessGroup | None = None,
        *,
        own: Collection[str] | None = None,
        writers: Gather | None = None,
        borrow: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Finds the banks of experts that are split.

        Args:
            chain: In its final form: banks split, parameters where the host keeps them.
            store: Where the host keeps them.
            gather: The processes that together hold the chain.
            group: Their process group; None is the default one.
            own: Layers that this process trains, saves and loads; None: all.
            writers: The processes that hold the same layers as this one; None: all.
            borrow: Context within which this process has the current tensors of a layer, also of another process'
                layer. Entered by every process.
        """
        self._chain, self._store, self._gather, self._group = chain, store, gather, group
        self._own_layers, self._writers, self._borrow = own, gather if writers is None else writers, borrow
        banks = [module for module in chain.modules() if isinstance(module, ExpertBank) and module.exchange is not None]
        self._bank_of = {id(parameter): bank for bank in banks for parameter in bank.parameters()}

    def shard(self) -> Shard:
        """The part that this replica writes, as views of the host's memory. No communication."""
        moments = (steps := self._store.steps()) > 0
        sharded: list[Piece] = []
        alike: dict[int, list[Piece]] = {}
        for _, tensors in self._layers(self._own_layers):
            for name, tensor in tensors.items():
                for field in self._fields(tensor, moments=moments):
                    piece = self._piece(name, tensor, field)
                    parts = 1 if (exchange := self._exchange(tensor)) is None else exchange.parts
                    (sharded if self._is_sharded(tensor, field) else alike.setdefault(parts, [])).append(piece)
        for parts, pieces in alike.items():
            # Replicas 0 .. parts - 1 together hold one copy of a bank, the following ones the next copy.
            sharded += share(pieces, self._writers.replica // parts, self._writers.replicas // parts)
        index = {"steps": steps, "tensors": self._shapes(moments=moments)}
        return make_shard(self._gather.replica, sharded, index if self._gather.replica == 0 else None)

    def load(self, folder: Path) -> None:
        """Reads this replica's share from the shards of all replicas.

        Raises:
            CheckpointError: The folder has no such files, or they do not fit the chain and what it trains.
        """
        saved = SavedTensors(folder, first=self._gather.replica)
        self._store.make_exact()
        moments = saved.steps > 0
        layers = None if self._own_layers is None else frozenset(self._own_layers)
        written = {key: shape for key, shape in saved.shapes.items() if layers is None or _layer_of(key) in layers}
        try:
            match_weights(self._shapes(self._own_layers, moments=moments), written, strict=True)
            if moments:
                self._store.begin(saved.steps)
            for _, tensors in self._layers(self._own_layers):
                for name, tensor in tensors.items():
                    for field in self._fields(tensor, moments=moments):
                        piece = self._piece(name, tensor, field)
                        piece.held.copy_(saved.read(piece.key, piece.start, piece.held.numel()))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: does not fit this model and what it trains: {error}") from error
        self._store.finish()
        self.wait()

    def load_weights(self, weights: Mapping[str, Tensor] | None, *, strict: bool = True) -> WeightsReport:
        """Copies replica 0's whole weights into every replica's share. See ``engine.hosts.base.Host``."""
        own = {name: self._shape(tensor) for _, tensors in self._layers() for name, tensor in tensors.items()}
        report = agree_on_weights(own, weights, strict=strict, gather=self._gather, group=self._group)
        matched, first = frozenset(report.matched), self._gather.replica == 0
        assert weights is not None or not first
        self._store.make_exact()
        for layer, tensors in self._layers():
            mine = self._own_layers is None or layer in self._own_layers
            for name in sorted(tensors.keys() & matched):
                tensor = tensors[name]
                whole = torch.empty(self._shape(tensor), dtype=tensor.dtype, device=tensor.device)
                if weights is not None and first:
                    whole.copy_(weights[name])
                if self._gather.replicas > 1:
                    broadcast_from_first(whole, self._group)
                if mine:
                    piece = self._piece(name, tensor, WEIGHT)
                    piece.held.copy_(whole.view(-1)[piece.start : piece.start + piece.held.numel()])
        self._store.finish()
        return report

    def full_weights(self) -> Mapping[str, Tensor] | None:
        """All parameters and buffers on the CPU of replica 0, read layer by layer; None elsewhere."""
        found = dict(self.each_weight())
        return found if self._gather.replica == 0 else None

    def announced(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and whole shape of every parameter and buffer, by name."""
        return {
            name: (tensor.dtype, self._shape(tensor))
            for _, tensors in self._layers()
            for name, tensor in tensors.items()
        }

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer in turn, whole, on the CPU of replica 0; yields nothing elsewhere.

        Every replica has to call it and to iterate to the end, since the others need its tensors.
        """
        first = self._gather.replica == 0
        self._store.make_exact()
        for layer, tensors in self._layers():
            with self._borrow(layer):
                for name, tensor in tensors.items():
                    whole = self._whole(tensor)
                    if first:
                        yield name, whole.to("cpu", copy=True)

    def _layers(self, names: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The name of each layer, of those asked for, and its parameters and buffers by their names in the chain."""
        for name, layer in self._chain.named_children():
            if names is not None and name not in names:
                continue
            yield name, layer.state_dict(prefix=f"{name}.", keep_vars=True)

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The whole shape, with the experts of all parts."""
        shape, bank = whole_shape(tensor), self._bank_of.get(id(tensor))
        return shape if bank is None else (bank.num_experts, *shape[1:])

    def _shapes(self, names: Collection[str] | None = None, *, moments: bool) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the tensors of layers by their keys in a checkpoint."""
        return {
            f"{field}/{name}": self._shape(tensor)
            for _, tensors in self._layers(names)
            for name, tensor in tensors.items()
            for field in self._fields(tensor, moments=moments)
        }

    def _exchange(self, tensor: Tensor) -> ExpertExchange | None:
        """The exchange with the other parts of the bank to which a tensor belongs; None if the bank is not split."""
        bank = self._bank_of.get(id(tensor))
        return None if bank is None else bank.exchange

    def _is_sharded(self, tensor: Tensor, field: str) -> bool:
        """Whether the host shards a tensor over the replicas that have the same layers and experts."""
        return isinstance(tensor, nn.Parameter) and self._store.group(tensor, field) is not None

    def _run(self, tensor: Tensor, field: str) -> Run:
        return self._store.run(tensor, field) if isinstance(tensor, nn.Parameter) else Run(tensor.detach().view(-1), 0)

    def _piece(self, name: str, tensor: Tensor, field: str) -> Piece:
        """This replica's part of a tensor, and its offset in the whole one."""
        run, shape = self._run(tensor, field), self._shape(tensor)
        bank = self._bank_of.get(id(tensor))
        before = 0 if bank is None else bank.own.start * torch.Size(shape[1:]).numel()
        return Piece(f"{field}/{name}", shape, before + run.start, run.held)

    def _whole(self, tensor: Tensor) -> Tensor:
        """A whole weight or buffer, joined from all parts. Called by every replica."""
        run, here = self._run(tensor, WEIGHT), whole_shape(tensor)
        whole = run.held
        if self._is_sharded(tensor, WEIGHT):
            # Each replica has its part at its offset and zeros elsewhere: the sum is exact.
            whole = torch.zeros(torch.Size(here).numel(), dtype=run.held.dtype, device=tensor.device)
            whole[run.start : run.start + len(run.held)] = run.held
            dist.all_reduce(whole, group=self._store.group(cast("nn.Parameter", tensor), WEIGHT))
        exchange = self._exchange(tensor)
        return whole.view(here) if exchange is None else exchange.join(whole.view(here))

    def _fields(self, tensor: Tensor, *, moments: bool) -> tuple[str, ...]:
        """The fields of a tensor in a file: the tensor itself, and its moments if it is trained."""
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        return (WEIGHT, *(self._store.moments(cast("nn.Parameter", tensor)) if moments and trained else ()))

    def wait(self) -> None:
        """Waits for every replica."""
        if self._gather.replicas > 1:
            dist.barrier(self._group)


class HoldingHost:
    """The methods of ``engine.hosts.base.Host`` that read and write, for hosts that keep their tensors in ``Holdings``.

    Attributes:
        chain: The chain that is trained.
    """

    chain: Chain
    _holdings: Holdings

    @property
    def takes_batches(self) -> bool:
        """True, except for later stages of a pipeline."""
        return True

    @property
    def computes_losses(self) -> bool:
        """True, except for earlier stages of a pipeline."""
        return True

    def whole_chain(self) -> AbstractContextManager[Chain]:
        """The chain; hosts that keep weights elsewhere fetch them first."""
        return nullcontext(self.chain)

    def shard(self) -> Shard:
        """This process' part of weights, buffers, twins and moments."""
        return self._holdings.shard()

    def save(self, folder: Path) -> None:
        """Writes this process' shard into a folder that all share, and waits for the others."""
        folder.mkdir(parents=True, exist_ok=True)
        shard = self.shard()
        shard.write(folder, shard.placed())
        self.barrier()

    def load(self, folder: Path) -> None:
        """Restores what any host saved."""
        self._holdings.load(folder)

    def load_weights(self, weights: Mapping[str, Tensor] | None, *, strict: bool = True) -> WeightsReport:
        """Copies replica 0's whole weights into every replica's share, and into the optimizer's copy of them."""
        return self._holdings.load_weights(weights, strict=strict)

    def full_weights(self) -> Mapping[str, Tensor] | None:
        """All parameters and buffers on the CPU of replica 0, read layer by layer; None elsewhere."""
        return self._holdings.full_weights()

    def announced_weights(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and whole shape of what ``each_weight`` gives, by name."""
        return self._holdings.announced()

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """What ``full_weights`` returns, one tensor after the other."""
        return self._holdings.each_weight()

    def barrier(self) -> None:
        """Waits for every replica."""
        self._holdings.wait()


def _layer_of(key: str) -> str:
    """``embed`` for ``weight/embed.kinds``."""
    return key.partition("/")[2].partition(".")[0]
