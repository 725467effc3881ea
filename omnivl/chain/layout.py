"""Which passes a step makes: the objectives' demands folded into one ``StepLayout``."""

from collections.abc import Sequence

from omnivl.chain.objective import Demands, Objective
from omnivl.chain.state import StepLayout
from omnivl.data.batch import DataKind
from omnivl.errors import ModelError


def plan_layout(objectives: Sequence[Objective], kind: DataKind, batch_size: int, num_frames: int) -> StepLayout:
    """Works out the layout of a training step. A pure function, so that every pipeline stage finds the same.

    Args:
        objectives: The stage's objectives, in the plan's order; segments are stacked in it.
        kind: Kind of the batch.
        batch_size: B.
        num_frames: T, 1 for images.

    Raises:
        ModelError: Two objectives claim a segment of the same name.
    """
    asked = [(objective.name, objective.demands(kind, batch_size)) for objective in objectives]
    active = [(name, demands) for name, demands in asked if demands is not None]
    visual, text, alignment = _Stack(kind), _Stack(kind), _Stack(kind)
    if any(_needs_visual(demands) for _, demands in active):
        visual.add("clean", batch_size)
    if any(_needs_text(demands) for _, demands in active):
        text.add("clean", batch_size)
    for _, demands in active:
        for segment, rows in demands.masked_visual.items():
            visual.add(segment, rows)
        for segment, rows in demands.masked_text.items():
            text.add(segment, rows)
        for segment, rows in demands.alignment.items():
            alignment.add(segment, rows)
    return StepLayout(
        kind=kind,
        batch_size=batch_size,
        num_frames=num_frames,
        visual=visual.segments,
        text=text.segments,
        alignment=alignment.segments,
        embeddings=any(demands.embeddings for _, demands in active),
        generation=any(demands.generation for _, demands in active),
        momentum=any(demands.momentum for _, demands in active),
        objectives=tuple(name for name, _ in active),
        class_only=not any(_reads_all_positions(demands) for _, demands in active),
    )


def present_modalities(layout: StepLayout) -> tuple[str, ...]:
    """The modalities that have tokens in a step, of ``MODALITIES``."""
    visual = ("video" if layout.is_video else "image",) if layout.visual else ()
    return (*visual, "text") if layout.text or layout.alignment or layout.generation else visual


def _needs_visual(demands: Demands) -> bool:
    """Texts look at clean visual rows unless at masked ones, and the twins see the clean input."""
    looking = demands.alignment.keys() - demands.masked_visual.keys()
    implied = demands.embeddings or demands.momentum or demands.generation or bool(looking)
    return demands.visual or implied


def _needs_text(demands: Demands) -> bool:
    return demands.text or demands.embeddings or demands.momentum


def _reads_all_positions(demands: Demands) -> bool:
    masked = bool(demands.masked_visual or demands.masked_text)
    return demands.visual or demands.text or masked or demands.generation or bool(demands.alignment)


class _Stack:
    """Segments laid one after the other."""

    def __init__(self, kind: DataKind) -> None:
        self.kind, self.segments, self.rows = kind, dict[str, slice](), 0

    def add(self, name: str, rows: int) -> None:
        if rows == 0:
            return
        if name in self.segments:
            raise ModelError(
                f"objectives on {self.kind}: two of them claim the stacked rows {name!r}; "
                "each objective may stand once in a stage: remove one of them"
            )
        self.segments[name] = slice(self.rows, self.rows + rows)
        self.rows += rows
