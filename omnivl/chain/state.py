"""The state that travels along the chain, and the layout that says which rows of its stacks are what.

Shapes: B samples, T frames, N patches of a frame, S = 1 + T * N visual positions (class token first, then frame by
frame), L text positions, D hidden size, P projection size. R_* is a number of stacked rows: what needs several passes
(masked text, hard negatives, masked frames) is stacked along the batch, so that each block runs once per step.

``State`` is a dict because DeepSpeed finds tensors in tuples, lists and dicts only, and because a pipeline host can
then send its items; it is flat for the same reasons. Everything that is not a tensor lives in the ``StepLayout``, a
pure function of the plan and the batch's kind and size, so that any pipeline stage can work it out for itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from torch import Tensor

from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.parts.config import ModelConfig

CORE_FIELDS: Mapping[str, str] = {
    "frames": "uint8 [B, T, 3, H, W], from the batch",
    "token_ids": "int64 [B, L], from the batch",
    "identity": "int64 [B], from the batch",
    "label": "int64 [B], from the batch",
    "position": "int64 [B], from the batch",
    "visual": "float [R_visual, S, D]; rows by layout.visual",
    "text": "float [R_text, L, D]; rows by layout.text",
    "text_mask": "bool [R_text, L], true where there is a token",
    "visual_input": "float [R_visual, S, D]; what entered the encoder, kept where rows are joined",
    "text_input": "float [R_text, L, D]; likewise",
    "momentum_visual": "float [B, S, D], from the momentum twin, no gradient",
    "momentum_text": "float [B, L, D], from the momentum twin, no gradient",
    "visual_embedding": "float [B, P], projected and L2-normalised, fp32",
    "text_embedding": "float [B, P], projected and L2-normalised, fp32",
    "memory": "float [R_memory, S, D], visual features that texts look at; rows 0 .. B - 1 are the own, if there are",
    "alignment": "float [R_alignment, L, D]; rows by layout.alignment",
    "alignment_mask": "bool [R_alignment, L]",
    "alignment_memory": "int64 [R_alignment], the row of memory that each alignment row attends to",
    "generation": "float [B, L, D], causal stream of the generation decoder",
    "generation_mask": "bool [B, L]",
    "loss": "float [], the weighted sum of all losses",
}
"""Fields with a fixed meaning. Others are namespaced: ``mlm/targets``, ``loss/mlm`` (raw, before its weight),
``metric/univlc/temperature`` (detached), ``router/...``, ``cache/...``."""

Mode = Literal["train", "encode", "match", "generate"]


@dataclass(frozen=True)
class StepLayout:
    """Which passes a step makes and where their rows lie. Not a tensor in sight.

    Attributes:
        kind: Kind of the batch.
        batch_size: B.
        num_frames: T.
        mode: ``train`` runs losses; the others stop where their output exists (see ``Chain``).
        visual: Segments of ``state["visual"]`` by name: ``clean`` and one per masked visual pass. May be empty.
        text: Segments of ``state["text"]``: ``clean`` and one per masked text pass. May be empty.
        alignment: Segments of ``state["alignment"]``, e.g. ``vlm_positive``, ``vlm_negative_text``, ``mlm``.
        embeddings: Whether the clean streams are projected and compared.
        generation: Whether the generation stream runs.
        momentum: Whether the momentum twins run.
        objectives: Names of the objectives that are active on this kind.
        class_only: Whether nothing behind the encoders reads more than their first position. Their last blocks may
            then leave out the others: ``visual`` and ``text`` have one position from there on.
    """

    kind: DataKind
    batch_size: int
    num_frames: int
    mode: Mode = "train"
    visual: Mapping[str, slice] = field(default_factory=dict)
    text: Mapping[str, slice] = field(default_factory=dict)
    alignment: Mapping[str, slice] = field(default_factory=dict)
    embeddings: bool = False
    generation: bool = False
    momentum: bool = False
    objectives: tuple[str, ...] = ()
    class_only: bool = False

    @property
    def both_masked(self) -> tuple[str, ...]:
        """The alignment segments whose texts look at a masked visual instead of the clean one."""
        return tuple(name for name in self.alignment if name in self.visual)

    @property
    def is_video(self) -> bool:
        """Whether temporal attention and the 3D patch embedding act."""
        return is_video(self.kind)


class State(dict[str, Tensor]):
    """Named tensors plus their layout. A layer returns a new state and never changes the one it got."""

    layout: StepLayout

    def __init__(self, tensors: Mapping[str, Tensor], layout: StepLayout) -> None:
        super().__init__(tensors)
        self.layout = layout

    @classmethod
    def from_batch(cls, batch: Batch, layout: StepLayout) -> Self:
        """The state at the head of the chain."""
        core = {name: getattr(batch, name) for name in ("frames", "token_ids", "identity", "label", "position")}
        return cls({**core, **batch.prepared}, layout)

    def updated(self, *, drop: tuple[str, ...] = (), **tensors: Tensor) -> "State":
        """A copy with ``tensors`` set and ``drop`` left out. Names with a slash go through ``merged``."""
        return self.merged(tensors, drop=drop)

    def merged(self, tensors: Mapping[str, Tensor], *, drop: tuple[str, ...] = ()) -> "State":
        """As ``updated``, for names that are no Python identifiers.

        Raises:
            KeyError: A name is neither a core field nor namespaced: most likely a typing error.
        """
        for name in tensors:
            if name not in CORE_FIELDS and "/" not in name:
                raise KeyError(f"{name!r} is no field of State; known: {', '.join(CORE_FIELDS)}, or 'namespace/name'")
        kept = {name: tensor for name, tensor in self.items() if name not in drop}
        return State({**kept, **tensors}, self.layout)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, with the prefix cut off."""
        return {name[len(prefix) + 1 :]: tensor for name, tensor in self.items() if name.startswith(f"{prefix}/")}


def encoded_rows(config: ModelConfig, layout: StepLayout, stream: str) -> slice:
    """The stacked rows of ``visual`` or ``text`` that go through the encoder.

    All of them in towers. The unified transformer joins rows from their embeddings on, so that in training nobody reads
    what the first pass makes of rows that are only joined.
    """
    segments = layout.visual if stream == "visual" else layout.text
    if config.architecture == "towers" or layout.mode == "encode":
        wanted = list(segments.values())
    else:
        wanted = [
            rows
            for name, rows in segments.items()
            if (layout.embeddings if name == "clean" else name not in layout.alignment)
        ]
    return slice(min(rows.start for rows in wanted), max(rows.stop for rows in wanted)) if wanted else slice(0, 0)
