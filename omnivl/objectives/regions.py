"""Objectives on pictures and their texts that may be on regions of pictures instead, and what is said of these.

Shapes: B samples, K regions of a picture, R = B * (1 + K) rows of regions; see ``omnivl.chain.regions``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from omnivl.chain.demands import CLEAN, REGIONS
from omnivl.chain.objective import Objective
from omnivl.chain.regions import FIELDS, region_rows
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_label
from omnivl.data.fields import Field
from omnivl.errors import Misfit


@dataclass(frozen=True)
class RegionObjective(Objective):
    """Base of objectives that take pairs of a picture and its text, or of regions and what is said of them.

    Attributes:
        regions: Regions of each picture, drawn anew each time; 0: pictures as wholes. With regions the pairs are those
            of X-VLM: each picture with its text, and each region with its own, all alike; a picture that shows fewer
            has fewer. The samples' fields ``regions`` (texts, or objects with ``caption`` or ``attribute``) and
            ``region_boxes`` (boxes, or objects with ``box``) hold them, 256 at most. It needs an architecture with the
            stream ``regions``.
        shares_head: Key of an objective of the same kind, whose head this one uses, too; its options of the head are
            then without effect.
    """

    regions: int = 0
    shares_head: str | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.regions >= 0, "regions", "at least 0")

    @property
    def head_key(self) -> str:
        """See ``Objective``."""
        return self.key if self.shares_head is None else self.shares_head

    def misfits_beside(self, others: Mapping[str, Objective]) -> Iterator[Misfit]:
        """The head is that of another objective of the same kind."""
        owners = [key for key, one in others.items() if type(one) is type(self) and one.head_key == key]
        if self.shares_head is not None and self.shares_head not in owners:
            allowed = (
                f"key of an objective of its kind with a head of its own: {', '.join(map(repr, owners)) or 'none'}"
            )
            yield Misfit(("shares_head",), repr(self.shares_head), allowed, "change it, or leave it out")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Texts and boxes of regions."""
        return FIELDS if self.regions else {}

    @property
    def needs_whole_texts(self) -> bool:
        """Those of regions are texts of their own."""
        return self.regions > 0

    @property
    def pairs(self) -> str:
        """The segment of the texts, and of what they speak of."""
        return REGIONS if self.regions else CLEAN

    def takes(self, kind: DataKind) -> bool:
        """Whether samples of a kind may have what is asked for: regions are of images with a text."""
        return not self.regions or (kind == "image_text" and not is_label(kind))

    def num_pairs(self, batch_size: int) -> int:
        """B, or R."""
        return region_rows(batch_size, self.regions) if self.regions else batch_size

    def identity_of(self, state: State) -> Tensor:
        """What is equal for pairs that are no negatives of one another, int64 ``[B]`` or ``[R]``."""
        return state[f"{REGIONS}/identity"] if self.regions else state["identity"]

    def present(self, state: State) -> Tensor | None:
        """Which pairs there are, bool ``[R]``; None: all."""
        return state[f"{REGIONS}/present"] if self.regions else None
