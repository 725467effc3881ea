"""Which tensors of a state a pipeline stage reads, so that only those cross to it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnivl.chain.state import State, StepLayout


class Wanted(frozenset[str]):
    """Names of tensors; one that is empty, or ends with a slash, stands for all that begin with it."""

    def __contains__(self, name: object) -> bool:
        """Whether a tensor is among them."""
        if super().__contains__(name) or super().__contains__(""):
            return True
        parts = str(name).split("/")
        return any(super(Wanted, self).__contains__("/".join(parts[:end]) + "/") for end in range(1, len(parts)))


@dataclass(frozen=True)
class Notes:
    """What the passes of a stage did to the states of one kind of micro-batch.

    Attributes:
        read: See ``ReadState``.
        made: Likewise.
    """

    read: frozenset[str]
    made: frozenset[str]

    def wanted(self, after: Iterable[str] = ()) -> Wanted:
        """What has to be received: what was read, and what is wanted ``after`` and not made here."""
        return Wanted(self.read | (frozenset(after) - self.made))


class ReadState(State):
    """A state that notes what somebody asked for, and what was made since.

    Asking whether a name is there counts, whether it is or not, and going through all names counts as asking for all:
    what a layer does may depend on it.

    Attributes:
        read: What was asked for, of this state and of all that were made from it, before it was made.
        made: Names that were set or dropped.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], layout: StepLayout, read: set[str], made: Collection[str] = ()
    ) -> None:
        super().__init__(tensors, layout)
        self.read, self.made = read, frozenset(made)

    @classmethod
    def of(cls, state: State) -> "ReadState":
        """A received state, of which nothing has been read."""
        return cls(state, state.layout, set())

    def merged(self, tensors: Mapping[str, Tensor], *, drop: tuple[str, ...] = ()) -> "ReadState":
        """As ``State.merged``."""
        made = unread(self).merged(tensors, drop=drop)
        return ReadState(made, made.layout, self.read, self.made | frozenset(tensors) | frozenset(drop))

    def named(self, prefix: str) -> dict[str, Tensor]:
        """As ``State.named``; reads these names alone."""
        self.read.add(f"{prefix}/")
        return unread(self).named(prefix)

    def under(self, roots: Collection[str]) -> dict[str, Tensor]:
        """As ``State.under``; reads these names alone."""
        self.read |= {*roots, *(f"{root}/" for root in roots)}
        return unread(self).under(roots)

    def __getitem__(self, name: str) -> Tensor:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self._note(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._note(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.read.add("")
        return super().__iter__()

    def keys(self) -> Any:
        """As of a dict."""
        self.read.add("")
        return super().keys()

    def values(self) -> Any:
        """As of a dict."""
        self.read.add("")
        return super().values()

    def items(self) -> Any:
        """As of a dict."""
        self.read.add("")
        return super().items()

    def _note(self, name: object) -> None:
        if name not in self.made:
            self.read.add(str(name))


def unread(state: State) -> State:
    """The same tensors in a state that notes nothing."""
    return State({name: dict.__getitem__(state, name) for name in dict.__iter__(state)}, state.layout)


def notes_of(received: ReadState, after: State) -> Notes:
    """What was done to a state. The chain's last layer makes one of its own, which notes nothing."""
    return Notes(frozenset(received.read), after.made if isinstance(after, ReadState) else received.made)
