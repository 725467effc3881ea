"""What a module within a layer can say of parameters that are no ordinary matrices. The layer passes it on."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class HasUndecayed(Protocol):
    """A module with parameters of several dimensions that multiply nothing: tables, or the biases of a bank."""

    def undecayed(self) -> Iterator[nn.Parameter]:
        """These parameters, of the module itself."""


@runtime_checkable
class Resizable(Protocol):
    """A module with parameters whose size follows that of its input."""

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Brings a parameter from another size; see ``ChainLayer.resize``.

        Args:
            name: Of the module's own parameter.
            before: Its value at another first dimension, fp32; the others are equal.
            own: Its value here.
        """
