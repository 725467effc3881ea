"""The state that the layers of a chain pass on, and the layout that assigns its rows to segments.

Shapes: B samples, T frames, N patches of a frame, S = 1 + T * N visual positions (class token first, then frame by
frame), L text positions, D hidden size of a stream, P projection size. R_* is a number of stacked rows: inputs of
several passes (masked text, hard negatives, masked frames) are stacked along the batch, so that each block runs once
per step.

``State`` is a flat dict because DeepSpeed finds tensors in tuples, lists and dicts only, and because the pipeline host
sends its items. Everything that is not a tensor is in the ``StepLayout``: a pure function of the plan and of the
batch's data entry, kind and size, so that every pipeline stage can compute it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor

from omnivl.chain.demands import CLEAN, EMBEDDINGS, REGION_EMBEDDINGS, REGIONS, TWIN, Join, embedding_of
from omnivl.data.batch import Batch, DataKind, is_video

CORE_FIELDS: Mapping[str, str] = {
    "frames": "uint8 [B, T, 3, H, W], from the batch; absent where the kind shows nothing",
    "second_view": "uint8 [B, T, 3, H, W], from the batch: what momentum twins see; absent where it is frames",
    "grids": "int64 [B, 2], from the batch: rows and columns of patches; absent where all pictures have one size",
    "token_ids": "int64 [B, L], from the batch; absent where the kind has no text",
    "identity": "int64 [B], from the batch",
    "label": "int64 [B], from the batch",
    "position": "int64 [B], from the batch",
    "visual": "float [R_visual, S, D]; rows by layout.visual",
    "text": "float [R_text, L, D]; rows by layout.text",
    "text_mask": "bool [R_text, L], true where there is a token",
    "visual_mask": "bool [R_visual, S], true where there is a patch or class token; absent where everywhere",
    "visual_input": "float [R_visual, S, D]; what entered the encoder, kept where inputs are joined",
    "text_input": "float [R_text, L, D]; likewise",
    "regions": "float [R, 1 + N, D], the mean of a region, then all patches of its picture, where there are regions",
    "regions_mask": "bool [R, 1 + N], true for the region itself and its patches",
    "queries": "float [B, Q, D], what learnt queries gather from the clean visual rows, where an architecture has them",
    "pictures": "float [B, M * Q, D], what queries gather from each of a sample's M pictures or its clip, end to end",
    "momentum_visual": "float [R, S, D], from the momentum twin, no gradient; rows by layout.twins, clean in losses",
    "momentum_text": "float [R, L, D], likewise",
    "momentum_fused": "float [R, L, D], likewise; all its rows at the end",
    "momentum_memory": "float [R_memory, S, D], visual features of the momentum twin that momentum_fused looks at",
    "momentum_memory_mask": "bool [R_memory, S], as memory_mask",
    "momentum_fused_memory": "int64 [R], the row of momentum_memory that each row of momentum_fused looks at",
    "visual_embedding": "float [B, P], projected and L2-normalised, fp32; [B, M, P] where a sample has several",
    "text_embedding": "float [B, P], projected and L2-normalised, fp32",
    "momentum_visual_embedding": "float [B, P], from the momentum twin, no gradient",
    "momentum_text_embedding": "float [B, P], from the momentum twin, no gradient",
    "momentum_visual_parts": "float [B, S - 1, P], the twin's positions behind the first, projected and L2-normalised",
    "momentum_text_parts": "float [B, L - 1, P], likewise; text_mask/clean says which are tokens",
    "logit_scale": "float [], 1 / temperature, fp32",
    "memory": "float [R_memory, S, D], visual features that texts look at; rows 0 .. B - 1 are the own, if there are",
    "fused": "float [R_fused, L, D]; rows by layout.fused",
    "fused_mask": "bool [R_fused, L]",
    "fused_memory": "int64 [R_fused], the row of memory that each fused row looks at",
    "pooled": "float [R_fused, D]; what stands for each fused row as a whole, where an architecture makes it",
    "generation": "float [R_generation, L, D]; rows by layout.generation",
    "generation_mask": "bool [R_generation, L]",
    "generation_memory": "int64 [R_generation], as fused_memory; where layout.written_from names fused segments, the "
    "row of these, end to end; absent where row b looks at row b",
    "memory_mask": "bool [R_memory, S], which positions of memory are no padding; absent where all are",
    "prefix": "float [B, Q, D], what stands before the tokens of the language rows, where queries are read",
    "language": "float [R_language, Q + L, D]; rows by layout.language; without Q where no queries are read",
    "language_mask": "bool [R_language, Q + L]",
    "loss": "float [], the weighted sum of all losses",
}
"""Fields with a fixed meaning. Others are namespaced: ``mlm/targets``, ``visual/mrm`` (rows of a segment), ``loss/mlm``
(raw, before its weight), ``term_weight/mlm``, ``logits/prefix_lm``, ``metric/univlc/temperature`` (detached),
``router/...``, ``cache/...``, and ``field/boxes`` for the samples' fields."""

Mode = Literal["train", "encode", "predict"]


@dataclass(frozen=True)
class StepLayout:
    """The passes of a step and the rows of each. Contains no tensor.

    Attributes:
        kind: Kind of the batch.
        batch_size: B.
        num_frames: T.
        mode: ``train`` computes losses, ``predict`` the predictions of the objectives' heads; ``encode`` ends at the
            embeddings.
        visual: Segments of ``state["visual"]`` by name: ``clean`` and one per masked visual pass. May be empty.
        text: Segments of ``state["text"]``: ``clean`` and one per masked text pass. May be empty.
        fused: Segments of ``state["fused"]``, one for each join that is not causal.
        generation: Segments of ``state["generation"]``, one for each causal join.
        language: Segments of ``state["language"]``.
        joins: The joins of these segments, by the same names.
        reads: Fields that losses read; see ``Demands.reads``.
        fused_text: Segments of ``fused`` of which losses read the text's positions.
        fused_visual: Segments of ``fused`` of which losses read the visual positions.
        draws_from: Fields that are read to draw samples; see ``Demands.draws_from``.
        twins: Segments of ``state["momentum_{stream}"]`` by stream: those that the stream's momentum twin computes.
        objectives: Keys of the objectives that are active in the step.
        regions: Texts about regions of each picture, beside that about the whole; see ``omnivl.chain.regions``.
        patches: Patches of a frame on average, where operations on pictures of their own sizes are counted.
        learning: The layout of a step without what losses read and give no gradient; None where they read no such
            thing. A layer without a gradient is one that rests under it.
        class_only: Whether layers after the encoders read only the first position. The last blocks of the encoders may
            then leave out the others: ``visual`` and ``text`` have one position from there on.
    """

    kind: DataKind
    batch_size: int
    num_frames: int
    mode: Mode = "train"
    visual: Mapping[str, slice] = field(default_factory=dict)
    text: Mapping[str, slice] = field(default_factory=dict)
    fused: Mapping[str, slice] = field(default_factory=dict)
    generation: Mapping[str, slice] = field(default_factory=dict)
    language: Mapping[str, slice] = field(default_factory=dict)
    joins: Mapping[str, Join] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    fused_text: tuple[str, ...] = ()
    fused_visual: tuple[str, ...] = ()
    draws_from: frozenset[str] = frozenset()
    twins: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)
    objectives: tuple[str, ...] = ()
    regions: int = 0
    class_only: bool = False
    patches: float | None = None
    learning: "StepLayout | None" = None

    @property
    def is_video(self) -> bool:
        """Whether temporal attention and the 3D patch embedding act."""
        return is_video(self.kind)

    @property
    def fields(self) -> frozenset[str]:
        """All fields that are read, with or without a gradient."""
        return self.reads | self.draws_from

    @property
    def embeds(self) -> bool:
        """Whether clean rows are projected into the common space."""
        return self.mode == "encode" or not self.fields.isdisjoint(EMBEDDINGS)

    @property
    def embedded_texts(self) -> tuple[str, ...]:
        """Segments of the text stream besides the shared ones that are projected into the common space."""
        own = (name for name in self.text if name not in (CLEAN, REGIONS))
        return tuple(name for name in own if embedding_of(name) in self.reads)

    @property
    def embeds_regions(self) -> bool:
        """Whether regions and what is said of them are projected into the common space."""
        return not self.fields.isdisjoint(REGION_EMBEDDINGS)

    @property
    def joined(self) -> frozenset[str]:
        """The segments of the visual and text streams that fused rows consist of."""
        fused = [self.joins[name] for name in self.fused]
        return frozenset(segment for join in fused for segment in (join.text, *join.seen))

    @property
    def written_from(self) -> tuple[str, ...]:
        """Segments of ``fused`` that generated rows look at, each once; none where they look at ``memory``."""
        seen = dict.fromkeys(self.joins[name].seen[0] for name in self.generation)
        return tuple(name for name in seen if name in self.fused)

    @property
    def learnt(self) -> "StepLayout":
        """The layout of what gets a gradient: ``learning``, or the layout itself."""
        return self if self.learning is None else self.learning

    def segments(self, stream: str) -> Mapping[str, slice]:
        """The segments of a stream's stack; ``momentum_`` before it: of what its momentum twin computes."""
        if stream.startswith(TWIN):
            return self.twins.get(stream.removeprefix(TWIN), {})
        found: Mapping[str, slice] = getattr(self, stream)
        return found


class State(dict[str, Tensor]):
    """Named tensors plus their layout. A layer returns a new state and never changes its input."""

    layout: StepLayout

    def __init__(self, tensors: Mapping[str, Tensor], layout: StepLayout) -> None:
        super().__init__(tensors)
        self.layout = layout

    @classmethod
    def from_batch(cls, batch: Batch, layout: StepLayout) -> Self:
        """The state at the head of the chain."""
        names = ("frames", "second_view", "grids", "token_ids", "identity", "label", "position")
        core = {name: getattr(batch, name) for name in names}
        present = {name: tensor for name, tensor in core.items() if tensor is not None}
        fields = {f"field/{name}": value for name, value in batch.fields.items() if isinstance(value, Tensor)}
        return cls({**present, **fields, **batch.prepared}, layout)

    def updated(self, *, drop: tuple[str, ...] = (), **tensors: Tensor) -> "State":
        """A copy with ``tensors`` set and ``drop`` left out. Names with a slash go through ``merged``."""
        return self.merged(tensors, drop=drop)

    def merged(self, tensors: Mapping[str, Tensor], *, drop: tuple[str, ...] = ()) -> "State":
        """As ``updated``, for names that are no Python identifiers.

        Raises:
            KeyError: A name is neither a core field nor namespaced; most likely it is misspelt.
        """
        for name in tensors:
            if name not in CORE_FIELDS and "/" not in name:
                raise KeyError(f"{name!r} is no field of State; known: {', '.join(CORE_FIELDS)}, or 'namespace/name'")
        kept = {name: tensor for name, tensor in self.items() if name not in drop}
        return State({**kept, **tensors}, self.layout)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, with the prefix cut off."""
        return {name[len(prefix) + 1 :]: tensor for name, tensor in self.items() if name.startswith(f"{prefix}/")}

    def under(self, roots: Collection[str]) -> dict[str, Tensor]:
        """The tensors whose names, up to the first slash, are among ``roots``."""
        return {name: tensor for name, tensor in self.items() if name.split("/")[0] in roots}

    def term_weight(self, name: str) -> Tensor | None:
        """What one of an objective's ``terms`` weighs in its loss, fp32 scalar; None where no host has counted them."""
        return self.get(f"term_weight/{name}")

    def rows(self, stream: str, segment: str) -> Tensor:
        """A segment of a stream's stack, at any position in the chain.

        Raises:
            KeyError: The layout has no such segment, or its stream has been dropped.
        """
        apart = self.get(f"{stream}/{segment}")
        return part(self[stream], self.layout.segments(stream)[segment]) if apart is None else apart

    def of_twins(self, field: str, stream: str) -> Tensor:
        """The rows of a field, stacked as a stream, of the segments that the stream's momentum twin computes."""
        rows = [part(self[field], self.layout.segments(stream)[name]) for name in self.layout.twins[stream]]
        return joined(rows)

    def pooled(self, *joins: str) -> Tensor:
        """The pooled representation of each fused row of joins, one below the other, ``[R, D]``.

        This is ``pooled`` if the architecture computes it, which it does if an objective's ``reads`` name it; else the
        row's first position.
        """
        pooled = self["pooled"] if "pooled" in self else self["fused"][:, 0]
        rows = [self.layout.fused[join] for join in joins]
        if all(one.stop == other.start for one, other in pairwise(rows)):
            return part(pooled, slice(rows[0].start, rows[-1].stop))
        return torch.cat([pooled[own] for own in rows])


def part(rows: Tensor, own: slice) -> Tensor:
    """Some rows; all of them are the tensor itself, whose gradient is then not copied into one of zeros."""
    return rows if own.start == 0 and own.stop == len(rows) else rows[own]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts one below the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
