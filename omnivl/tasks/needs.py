"""What a task reads of a trained stage, and how a stage that does not have it is described.

``omnivl check`` and ``omnivl evaluate`` ask the same question and use the same words.
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
    """What a stage provides to tasks.

    Attributes:
        model: The stage's model.
        objectives: The stage's objectives. Their heads are part of the stage's chain.
        earlier: Objectives of the stages whose weights it started from. Their heads are no part of the chain; what
            they trained of the encoders is.
    """

    model: Architecture
    objectives: tuple[Objective, ...]
    earlier: tuple[Objective, ...] = ()


@dataclass(frozen=True)
class Lack:
    """Why a stage cannot do a task as it is configured.

    Attributes:
        what: Goes behind "a stage that": ``does not train 'lm'``.
        remedy: What to change in the plan: ``add the objective 'lm'``.
        option: Name of the task's field that asks for what is lacking; None where the task itself does.
        without: Value of ``option`` with which the task can be done.
    """

    what: str
    remedy: str
    option: str | None = None
    without: Any = None


class Need(ABC):
    """One thing that a task reads."""

    @abstractmethod
    def lack(self, stage: Provided) -> Lack | None:
        """What the stage lacks; None where it has what is needed."""


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


class Embeddings(Need):
    """Embeddings of pictures and texts that a loss has compared, in this stage or in an earlier one."""

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        for objective in (*stage.objectives, *stage.earlier):
            if all(objective.reads(field) for field in EMBEDDINGS):
                return None
        return Lack("has no trained embeddings", "add a contrastive objective such as 'univlc'")


@dataclass(frozen=True)
class Shown(Need):
    """An architecture that takes what the samples show.

    Attributes:
        media: ``image`` or ``video``.
    """

    media: Media

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        if ("clip" if self.media == "video" else "image") in stage.model.shows:
            return None
        what = f"has architecture {stage.model.kind!r}, which takes no {self.media}"
        return Lack(what, "change model.kind", "media", "image" if self.media == "video" else "video")
