"""Requirements of a task on a trained stage, and messages for stages that do not meet them.

``omnivl check`` and ``omnivl evaluate`` use the same checks and messages.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from omnivl.architectures import Architecture
from omnivl.chain.demands import EMBEDDINGS
from omnivl.chain.objective import Objective
from omnivl.inference.pictures import Media


@dataclass(frozen=True)
class Provided:
    """The stage that tasks check.

    Attributes:
        model: The stage's model.
        objectives: The stage's objectives, whose heads are part of its chain.
        earlier: Objectives of the stages whose weights it started from. Their heads are not part of the chain, but the
            encoders that they trained are.
    """

    model: Architecture
    objectives: tuple[Objective, ...]
    earlier: tuple[Objective, ...] = ()


@dataclass(frozen=True)
class Lack:
    """Why a stage cannot run a task as configured.

    Attributes:
        what: Continues "a stage that": ``does not train 'lm'``.
        remedy: What to change in the plan: ``add the objective 'lm'``.
        option: Name of the task's field that causes the need; None if the task always has it.
        without: Value of ``option`` with which the task can run.
    """

    what: str
    remedy: str
    option: str | None = None
    without: Any = None


class Need(ABC):
    """One requirement of a task."""

    @abstractmethod
    def lack(self, stage: Provided) -> Lack | None:
        """What the stage lacks; None if it meets the need."""


@dataclass(frozen=True)
class Head(Need):
    """The head of an objective, which only a stage that trains the objective has.

    Attributes:
        objective: Key of the objective, as ``Encoder.predict`` takes it.
        option: See ``Lack``.
        without: See ``Lack``.
    """

    objective: str
    option: str | None = None
    without: Any = None

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        objective = next((one for one in stage.objectives if one.key == self.objective), None)
        if objective is None:
            what, remedy = f"does not train {self.objective!r}", f"add the objective {self.objective!r}"
            return Lack(what, remedy, self.option, self.without)
        if not objective.predicts:
            what = f"trains {self.objective!r}, which predicts nothing"
            return Lack(what, "name another objective", self.option, self.without)
        return None


@dataclass(frozen=True)
class Chooses(Need):
    """The head of an objective of some kinds.

    Attributes:
        objective: Its key.
        kinds: Classes of objectives.
        option: See ``Lack``.
        without: See ``Lack``.
    """

    objective: str
    kinds: tuple[type[Objective], ...]
    option: str | None = None
    without: Any = None

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        found = next((one for one in stage.objectives if one.key == self.objective), None)
        if found is None or isinstance(found, self.kinds):
            return Head(self.objective, self.option, self.without).lack(stage)
        names = " or ".join(repr(one.kind) for one in self.kinds)  # type: ignore[attr-defined]  # every member has one
        what, remedy = f"trains {self.objective!r}, which is of another kind", f"name an objective of kind {names}"
        return Lack(what, remedy, self.option, self.without)


@dataclass(frozen=True)
class ScoresPairs(Need):
    """The head of an objective that scores how well a text and a picture match; attributes as those of ``Head``."""

    objective: str
    option: str | None = None
    without: Any = None

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        found = next((one for one in stage.objectives if one.key == self.objective), None)
        if found is None or found.scores_pairs:
            return Head(self.objective, self.option, self.without).lack(stage)
        what = f"trains {self.objective!r}, which scores no pairs"
        return Lack(what, "name an objective that does, such as 'vlm', 'itm' or 'mmm'", self.option, self.without)


class Embeddings(Need):
    """Embeddings of pictures and texts that a contrastive loss has trained, in this stage or an earlier one."""

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        for objective in (*stage.objectives, *stage.earlier):
            if objective.trained.issuperset(EMBEDDINGS):
                return None
        return Lack("has no trained embeddings", "add a contrastive objective such as 'univlc'")


@dataclass(frozen=True)
class PartsOfPictures(Need):
    """Views of parts of a picture, of which there are several; those of whole pictures would all be the same.

    Attributes:
        option: See ``Lack``.
        without: See ``Lack``.
    """

    option: str
    without: Any

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        if stage.model.sizes == "fixed":
            return None
        what = f"sees whole pictures (model.sizes: {stage.model.sizes}), of which all crops would be the same"
        return Lack(what, "set model.sizes to 'fixed'", self.option, self.without)


@dataclass(frozen=True)
class Shown(Need):
    """An architecture that takes images, clips or sets of images.

    Attributes:
        media: ``image`` or ``video``.
        sets: Whether samples are sets of images.
    """

    media: Media
    sets: bool = False

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        if ("set" if self.sets else "clip" if self.media == "video" else "image") in stage.model.shows:
            return None
        if self.sets:
            what = f"has architecture {stage.model.kind!r}, which takes no sets of pictures"
            return Lack(what, "change model.kind", "pictures", ())
        what = f"has architecture {stage.model.kind!r}, which takes no {self.media}"
        return Lack(what, "change model.kind", "media", "image" if self.media == "video" else "video")
