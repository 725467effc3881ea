"""The transfer of weights from an earlier stage to a later one, by parameter name.

Carried: same name, same shape. Upcycled: made from another filling of the feed-forward slot (``moe.upcycle``). Resized:
position tables of another picture size, clip or text length, and the 3D patch kernel of another tubelet, as the layers
say (``ChainLayer.resize``). Copied: blocks of a stack that the earlier stage does not have, from the stack that the
architecture names (``Architecture.starts_from``), if of the same shape. Created: heads of new objectives, new momentum
twins (as copies of what they follow). Aside: heads of objectives that the new stage does not have; they stay in its
weights file, unchanged, for a later stage that has them again. Dropped: other tensors that the new stage does not have
(twins, the queue). The 3D patch kernel is the 2D one plus a difference (``omnivl.parts.embed``): before the first clip
the difference is zero, so that the first stage with clips starts from the inflated 2D kernel.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from engine.disk.aside import ASIDE, is_head
from engine.errors import CheckpointError
from engine.telemetry.console import PlainTable
from moe.upcycle import place, translated
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.names import stack_of
from omnivl.randomness import stable_hash

_TWIN = "momentum_"
_QUEUE = "queue."


@dataclass(frozen=True)
class HandOver:
    """Names of parameters and buffers by outcome of the hand-over.

    Attributes:
        source: Name of the earlier stage.
        carried: Copied as they were.
        inflated: 3D patch kernels that still equal the 2D ones; carried.
        resized: Interpolated to another shape.
        upcycled: Made from the earlier stage's feed-forward layers, which were of another kind.
        copied: Copied from another stack.
        created: New in this stage.
        aside: Heads that this stage does not have, kept for later ones.
        dropped: Left behind.
    """

    source: str
    carried: tuple[str, ...]
    inflated: tuple[str, ...]
    resized: tuple[str, ...]
    upcycled: tuple[str, ...]
    copied: tuple[str, ...]
    created: tuple[str, ...]
    aside: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def given(self) -> tuple[str, ...]:
        """Names of what got its value from the weight of the same name or place; not of copies from another stack."""
        return (*self.carried, *self.inflated, *self.resized, *self.upcycled)

    def as_json(self) -> dict[str, object]:
        """Plain containers, for ``handover.json``."""
        return asdict(self)

    def table(self, title: str) -> PlainTable:
        """Number of tensors by layer stack and by outcome, for the console."""
        table = PlainTable(title=title)
        columns = ("carried", "inflated", "resized", "upcycled", "copied", "created", "aside", "dropped")
        table.add_column("part")
        for column in columns:
            table.add_column(column, justify="right")
        counts: dict[str, dict[str, int]] = {}
        for column in columns:
            for name in getattr(self, column):
                part = counts.setdefault(stack_of(name), dict.fromkeys(columns, 0))
                part[column] += 1
        for stack, by_column in counts.items():
            table.add_row(stack, *(str(by_column[column] or "-") for column in columns))
        return table


class Inheritance:
    """Copies an earlier stage's weights into the layers of a chain, one layer after the other."""

    def __init__(
        self,
        names: Collection[str],
        read: Callable[[Collection[str]], Mapping[str, Tensor]],
        source: str,
        *,
        starts_from: Mapping[str, str] | None = None,
        upcycle_noise: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        """Sorts the names by layer; reads nothing.

        Args:
            names: All parameters and buffers of the earlier stage, and heads that it kept aside.
            read: Reads the tensors of some names, those of one layer at a time.
            source: The earlier stage's name.
            starts_from: See ``Architecture.starts_from``.
            upcycle_noise: Deviation of the noise on copied experts by stack, see ``moe.config.SparseConfig``; 0 if
                none is given.
            seed: Seed of the noise, together with the weight's name, so that every process and run draws the same. A
                momentum twin gets the noise of the weight that it follows.
        """
        self._read, self._source, self._noise, self._seed = read, source, upcycle_noise or {}, seed
        self._starts_from = starts_from or {}
        self._stored = {name.removeprefix(ASIDE): name for name in names}
        self._own: set[str] = set()
        self._fates: dict[str, list[str]] = {
            fate: [] for fate in ("carried", "inflated", "resized", "upcycled", "copied", "created")
        }

    @torch.no_grad()
    def give(self, name: str, layer: ChainLayer) -> None:
        """Copies the earlier weights of a layer into it.

        Args:
            name: The layer's name in the chain.
            layer: Freshly built and whole; changed in place.

        Raises:
            CheckpointError: A weight has another shape, and its layer cannot resize it.
        """
        own = layer.state_dict(prefix=f"{name}.")
        earlier = self._of_layer(name)
        if not earlier and layer.stack in self._starts_from:
            self._copy(name, name.replace(layer.stack, self._starts_from[layer.stack], 1), own)
            return
        queue_fits = all(_fits(own, earlier, inner) for inner in own if _QUEUE in inner)
        created = []
        for inner, tensor in own.items():
            noise = self._noise.get(layer.stack, 0.0), stable_hash(self._seed, "upcycle", _followed_by(inner) or inner)
            if inner not in earlier and (start := translated(inner, tensor.shape, earlier, *noise)) is not None:
                tensor.copy_(start)
                fate = "upcycled"
            elif inner not in earlier or (_QUEUE in inner and not queue_fits):
                fate = "created"
                created.append(inner)
            elif tensor.shape == earlier[inner].shape:
                tensor.copy_(earlier[inner])
                is_zero = inner.endswith("video_delta") and not tensor.is_meta and not bool(tensor.any())
                fate = "inflated" if is_zero else "carried"
            else:
                tensor.copy_(_resized(name, layer, inner, earlier[inner], tensor))
                fate = "resized"
            self._fates[fate].append(inner)
        for inner in created:
            followed = _followed_by(inner)
            if followed is not None and followed in own:  # a twin starts equal to the module that it follows
                own[inner].copy_(own[followed])
        self._own |= own.keys()

    def _of_layer(self, name: str) -> dict[str, Tensor]:
        """The earlier weights of a layer, by their names today."""
        plain = {inner: stored for inner, stored in self._stored.items() if inner.startswith(f"{name}.")}
        found = self._read(plain.values())
        return {inner: found[stored] for inner, stored in plain.items()}

    def _copy(self, name: str, other: str, own: Mapping[str, Tensor]) -> None:
        """Copies what has the same shape from an earlier layer of another name."""
        earlier = self._of_layer(other)
        for inner, tensor in own.items():
            start = earlier.get(other + inner.removeprefix(name))
            if start is not None and start.shape == tensor.shape:
                tensor.copy_(start)
                self._fates["copied"].append(inner)
            else:
                self._fates["created"].append(inner)
        self._own |= own.keys()

    def report(self) -> HandOver:
        """The report of the hand-over; to be called after the last layer."""
        homeless = [name for name in self._stored if name not in self._own]
        used = {place(name) for name in self._fates["upcycled"]}
        lost = [name for name in homeless if place(name) not in used]
        return HandOver(
            source=self._source,
            **{fate: tuple(names) for fate, names in self._fates.items()},
            aside=tuple(name for name in homeless if is_head(name)),
            dropped=tuple(name for name in lost if not is_head(name)),
        )


def hand_over(
    chain: Chain,
    earlier: Mapping[str, Tensor],
    source: str,
    *,
    starts_from: Mapping[str, str] | None = None,
    upcycle_noise: Mapping[str, float] | None = None,
    seed: int = 0,
) -> HandOver:
    """Copies weights into a freshly built, whole chain; arguments as those of ``Inheritance``."""

    def read(names: Collection[str]) -> Mapping[str, Tensor]:
        return {name: earlier[name] for name in names}

    inheritance = Inheritance(
        earlier.keys(), read, source, starts_from=starts_from, upcycle_noise=upcycle_noise, seed=seed
    )
    for name, layer in chain.named_layers.items():
        inheritance.give(name, layer)
    return inheritance.report()


def _resized(name: str, layer: ChainLayer, inner: str, before: Tensor, own: Tensor) -> Tensor:
    made = layer.resize(inner.removeprefix(f"{name}."), before, own)
    if made is None:
        raise CheckpointError(
            f"{inner}: has shape {list(before.shape)} in the earlier stage and {list(own.shape)} in this one; only "
            "position tables and 3D patch kernels can be resized: give both stages the same sizes, or start without "
            "init_from"
        )
    return made


def _fits(own: Mapping[str, Tensor], earlier: Mapping[str, Tensor], name: str) -> bool:
    return name in earlier and earlier[name].shape == own[name].shape


def _followed_by(name: str) -> str | None:
    """Name of the weight that a twin's weight follows; None for others."""
    parts = name.split(".")
    if not any(part.startswith(_TWIN) for part in parts):
        return None
    return ".".join(part.removeprefix(_TWIN) for part in parts)
