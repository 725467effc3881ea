"""All that a host holds, by parameter name and in a form that does not depend on how it is cut.

A folder has one safetensors file for each layer of the chain, with the layer's weights, buffers, momentum twins and
optimizer moments, whole and fp32. Layers are gathered one after the other and written by different replicas, so that no
process ever holds more than a layer; a bank of experts that is cut over processes is joined on the way. Every replica
reads its own share of the files, whichever host, ZeRO stage or number of processes wrote them.

    host/embed.safetensors          weight/embed.patches.weight, exp_avg/embed.patches.weight ...
    host/visual_00.safetensors
    ...
    host/optimizer.json             {"steps": 1200}
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.collectives import broadcast_from_first
from engine.errors import CheckpointError
from engine.hosts.base import WeightsReport
from engine.hosts.stores import MOMENTS, Store
from engine.hosts.weights import agree_on_weights, match_weights
from engine.whole import whole_shape
from moe.experts import ExpertBank
from omnivl.model.chain import Chain
from omnivl.model.gather import Gather

OPTIMIZER = "optimizer.json"
WEIGHT = "weight"


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
        """Looks the parameters over.

        Args:
            chain: In its final form: banks cut, parameters with the host.
            store: Where the host keeps them.
            gather: The processes that hold the chain between them.
            group: Their process group; None is the default one.
            own: Layers that this process trains, saves and loads; None: all.
            writers: The processes that hold the same layers as this one; None: all.
            borrow: Has the tensors of a layer here and current, own or not, as long as the context lasts. Entered by
                every process.
        """
        self._chain, self._store, self._gather, self._group = chain, store, gather, group
        self._own_layers, self._writers, self._borrow = own, gather if writers is None else writers, borrow
        banks = [module for module in chain.modules() if isinstance(module, ExpertBank) and module.exchange is not None]
        self._bank_of = {id(parameter): bank for bank in banks for parameter in bank.parameters()}

    def save(self, folder: Path) -> None:
        """Writes the folder, the layers in turn by different replicas.

        Raises:
            CheckpointError: This replica could not write its files, or one of them. It takes part to the end all the
                same, since the others read from it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        steps = self._store.steps()
        problem: Exception | None = None
        for number, (layer, tensors) in enumerate(self._layers(self._own_layers)):
            mine = number % self._writers.replicas == self._writers.replica
            held = dict(self._read(tensors, moments=steps > 0, keep=mine))
            if mine and held and problem is None:
                problem = _problem_of(partial(save_file, held, folder / f"{layer}.safetensors"))
        if self._gather.replica == 0 and problem is None:
            problem = _problem_of(partial((folder / OPTIMIZER).write_text, json.dumps({"steps": steps})))
        self.wait()
        if problem is not None:
            raise CheckpointError(str(problem)) from problem

    def load(self, folder: Path) -> None:
        """Reads this replica's share of what ``save`` wrote.

        Raises:
            CheckpointError: The folder has no such files, or they do not fit the chain and what it trains.
        """
        path = folder / OPTIMIZER
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; allowed is a folder that a host saved, with one file per layer")
        steps: int = json.loads(path.read_bytes())["steps"]
        if steps > 0:
            self._store.begin(steps)
        for layer, tensors in self._layers(self._own_layers):
            if tensors:
                self._load_layer(folder / f"{layer}.safetensors", tensors, moments=steps > 0)
        self._store.finish()
        self.wait()

    def load_weights(self, weights: Mapping[str, Tensor] | None, *, strict: bool = True) -> WeightsReport:
        """Copies replica 0's whole weights into every replica's share. See ``engine.hosts.base.Host``."""
        own = {name: self._shape(tensor) for _, tensors in self._layers() for name, tensor in tensors.items()}
        report = agree_on_weights(own, weights, strict=strict, gather=self._gather, group=self._group)
        matched, first = frozenset(report.matched), self._gather.replica == 0
        assert weights is not None or not first
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
                    self._set(tensor, WEIGHT, whole)
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
        """Every parameter and buffer in turn, whole, on the CPU of replica 0; nothing comes out elsewhere.

        Called by every replica, and gone through to its end by each: the others read from it.
        """
        first = self._gather.replica == 0
        for layer, tensors in self._layers():
            with self._borrow(layer):
                for name, tensor in self._read(tensors, moments=False, keep=first):
                    yield name.removeprefix(f"{WEIGHT}/"), tensor

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

    def _read(self, tensors: Mapping[str, Tensor], *, moments: bool, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """Joins a layer's tensors; copies on the CPU, by their names in a file, come out where they are to be kept."""
        for name, tensor in tensors.items():
            bank = self._bank_of.get(id(tensor))
            for field in _fields(tensor, moments=moments):
                whole = self._get(tensor, field)
                if bank is not None and bank.exchange is not None:
                    whole = bank.exchange.join(whole)
                if keep:
                    yield f"{field}/{name}", whole.to("cpu", copy=True)

    def _load_layer(self, path: Path, tensors: Mapping[str, Tensor], *, moments: bool) -> None:
        fields = {name: _fields(tensor, moments=moments) for name, tensor in tensors.items()}
        own = {f"{field}/{name}": self._shape(tensors[name]) for name in tensors for field in fields[name]}
        try:
            with safe_open(path, framework="pt") as file:
                written = {name: file.get_slice(name).get_shape() for name in iter(file.keys())}
                match_weights(own, written, strict=True)
                for name, tensor in tensors.items():
                    for field in fields[name]:
                        self._set(tensor, field, file.get_tensor(f"{field}/{name}"))
        except (OSError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(f"{path}: does not fit this model and what it trains: {error}") from error

    def _get(self, tensor: Tensor, field: str) -> Tensor:
        """A tensor of this replica's experts, or of all."""
        if field in MOMENTS:
            return self._store.moment(cast("nn.Parameter", tensor), field)
        return self._store.weight(tensor) if isinstance(tensor, nn.Parameter) else tensor.detach()

    def _set(self, tensor: Tensor, field: str, whole: Tensor) -> None:
        """Takes over this replica's share of a whole tensor."""
        bank = self._bank_of.get(id(tensor))
        here = whole if bank is None else whole[bank.own]
        if field in MOMENTS:
            self._store.set_moment(cast("nn.Parameter", tensor), field, here)
        elif isinstance(tensor, nn.Parameter):
            self._store.set_weight(tensor, here)
        else:
            tensor.copy_(here)

    def wait(self) -> None:
        """Waits for every replica."""
        if self._gather.replicas > 1:
            dist.barrier(self._group)


class HoldingHost:
    """The half of ``engine.hosts.base.Host`` that reads and writes, for hosts that keep their tensors in ``Holdings``.

    Attributes:
        chain: What is trained.
    """

    chain: Chain
    _holdings: Holdings

    @property
    def takes_batches(self) -> bool:
        """Every process does, but for a pipeline's."""
        return True

    def whole_chain(self) -> AbstractContextManager[Chain]:
        """The chain; hosts that keep weights elsewhere fetch them first."""
        return nullcontext(self.chain)

    def save(self, folder: Path) -> None:
        """Writes weights, buffers, twins and moments, a file for each layer."""
        self._holdings.save(folder)

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


def _problem_of(write: Callable[[], object]) -> Exception | None:
    """Writes; what went wrong, or None. safetensors wraps what the system says into an error of its own."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return error
    return None


def _fields(tensor: Tensor, *, moments: bool) -> tuple[str, ...]:
    """What a file has of a tensor: itself, and its moments where it is trained."""
    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
    return (WEIGHT, *(MOMENTS if moments and trained else ()))
