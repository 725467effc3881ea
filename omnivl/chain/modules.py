"""Interfaces of modules within a layer whose parameters are not ordinary matrices; the layer delegates to them."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from moe.linear import Linear, Role
from moe.stacked import Stacked


@runtime_checkable
class HasUndecayed(Protocol):
    """A module with parameters of several dimensions that are no factors of products: tables, biases of a bank."""

    def undecayed(self) -> Iterator[nn.Parameter]:
        """These parameters, of the module itself."""


@runtime_checkable
class HasStacked(Protocol):
    """A module with parameters that hold other matrices than their shape says."""

    def stacked(self) -> Iterator[tuple[nn.Parameter, Stacked]]:
        """These parameters, of the module itself, each with how matrices lie in it."""


@runtime_checkable
class HasMaps(Protocol):
    """A module of a block with linear maps that may have low-rank adapters."""

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """These maps, of the module itself, each with what it is for."""


@runtime_checkable
class Resizable(Protocol):
    """A module with parameters whose size follows that of its input."""

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes a parameter; see ``ChainLayer.resize``.

        Args:
            name: Of the module's own parameter.
            before: Its value at another first dimension, fp32; the others are equal.
            own: Its value here.
        """
