"""The base class of tasks: options in a plan, needs, and the run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Self

from moe.ranges import Range
from omnivl.data.config import DataEntryConfig
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet, Reads, evaluation_entry
from omnivl.objectives.text_lists import read_list
from omnivl.tasks.needs import Lack, Need, Provided, Shown
from omnivl.tasks.results import TaskResult

Where = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Samples:
    """Samples that a task reads.

    Attributes:
        path: Where the task's configuration names their source.
        source: The source.
        media: ``image`` or ``video``.
        where: Filter by metadata.
        reads: What they must have.
        max_samples: Upper bound on their number.
        pictures: Files that are a sample's pictures, see ``Task``.
    """

    path: tuple[str, ...]
    source: str
    media: Media
    where: Where
    reads: Reads
    max_samples: int
    pictures: tuple[str, ...] = ()

    @property
    def entry(self) -> DataEntryConfig:
        """The same as a data entry."""
        return evaluation_entry(self.source, self.media, self.where, self.reads, self.pictures)


@dataclass(frozen=True)
class Task(ABC):
    """Base of all tasks. Instances are frozen and are their own configuration.

    Every task narrows ``kind`` to one literal, its name in plans. Every field has a default, so that a kind alone
    specifies a task. Class attributes: ``reads``, what the task's samples must have beside a picture or clip;
    ``lower_is_better``, those of its figures of which the lowest value is the best: errors, ranks, distances;
    ``lists``, those of its fields that are a list of texts or the path of a file with one, which is read.

    Attributes:
        kind: Name of the task in plans.
        name: Name in the table of scores; if empty, the kind.
        source: Data source.
        media: ``image`` or ``video``.
        where: Filter of the samples by metadata, e.g. ``{style: [fluent]}``.
        max_samples: Upper bound on the number of samples; a larger source is thinned evenly.
        pictures: Files that are the pictures of a sample, which is a set of them: ``[left.png, right.png]``; none for
            samples of one picture or clip.
    """

    reads: ClassVar[Reads] = "caption"
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    lists: ClassVar[tuple[str, ...]] = ()

    kind: str = ""
    name: str = ""
    source: str = "emoji"
    media: Media = "image"
    where: Where = field(default_factory=dict)
    max_samples: Annotated[int, Range(1)] = 4096
    pictures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fills in the name and what the files of lists hold.

        Raises:
            UserError: A list cannot be read.
        """
        if not self.name:
            object.__setattr__(self, "name", self.kind)
        for option in self.lists:
            object.__setattr__(self, option, read_list(getattr(self, option), f"task {self.name}", option))

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the task, with its options, needs of a trained stage; nothing by default."""
        return ()

    @property
    def figures(self) -> tuple[str, ...]:
        """The metrics of its scores, with ``*`` for what the data decide; by default they are not known beforehand."""
        return ("*",)

    def prefers_lower(self, metric: str) -> bool:
        """Whether a lower value of a metric of its scores is better."""
        return any(fnmatchcase(metric, one) for one in self.lower_is_better)

    @abstractmethod
    def run(self, encoder: Encoder) -> TaskResult:
        """Runs the task. Called by every replica in the same order, without gradients and in evaluation mode.

        Args:
            encoder: The trained stage. Every replica calls its methods equally often.

        Returns:
            Equal on all replicas.
        """

    def lacks(self, stage: Provided) -> list[Lack]:
        """What the stage lacks for this task; empty if it can run it."""
        found = [need.lack(stage) for need in (Shown(self.media, bool(self.pictures)), *self.needs)]
        return [lack for lack in found if lack is not None]

    @property
    def samples(self) -> tuple[Samples, ...]:
        """The samples that the task reads: its own, and those of its baseline where it has one."""
        given = self.media, self.where, self.reads, self.max_samples, self.pictures
        own = Samples(("source",), self.source, *given)
        baseline = getattr(self, "baseline", None)
        if baseline is None:
            return (own,)
        path, limit = ("baseline", "source"), baseline.max_samples
        return own, Samples(path, baseline.source, baseline.media, baseline.where, self.reads, limit)

    def without_baseline(self) -> Self:
        """The same without its baseline, whose scores do not depend on what is trained."""
        none: dict[str, Any] = {"baseline": None}
        return self if getattr(self, "baseline", None) is None else replace(self, **none)

    def without_gallery(self) -> Self:
        """The same without examples for the report, where only scores are read."""
        none: dict[str, Any] = {"gallery": 0}
        return replace(self, **none) if getattr(self, "gallery", 0) else self

    def examine(self, pictures: PictureSet) -> None:
        """Looks whether samples have what the task reads, before it runs.

        Args:
            pictures: Some of the task's own samples.

        Raises:
            DataError: One of them lacks something.
        """
        if self.reads == "caption":
            _ = pictures.all_captions

    def picture_set(self, encoder: Encoder) -> PictureSet:
        """The samples of the task.

        Raises:
            DataError: There are none, or one of them is bad.
        """
        given = self.media, self.where, encoder.model.inputs, self.max_samples, self.reads
        return PictureSet(self.source, *given, pictures=self.pictures)
