"""What an objective needs computed: rows of the encoders' streams, rows that join a text with what it looks at, fields.

Streams of a chain; an architecture has some of them:

- ``visual``: images and clips alone; ``masked_visual``: the same with patches masked; ``text``: texts alone;
- ``queries``: what a fixed number of learnt queries gather from images and clips;
- ``regions``: boxes of the clean images, each with a position for itself and those of its patches;
- ``embedding``: their projections into a common space;
- ``fused``: texts beside what they look at, read at the text's positions; ``fused_visual``: the same rows, read at the
  visual positions; ``momentum_fused``: the same rows, computed by momentum twins;
- ``generation``: texts; each position sees the earlier positions and what the text looks at; ``fused_generation``: the
  same of texts that look at fused rows;
- ``language``: texts in a language model; each position sees the earlier positions, and the sample's queries where an
  objective reads these;
- ``interleaved``: the same texts; each position looks at the pictures before it, at places in the text.

A segment is a run of rows of a stream's stack. ``clean`` holds the batch's own samples as they are. ``regions`` holds
what is said of regions of each picture, and these regions: see ``omnivl.chain.regions``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

CLEAN, REGIONS = "clean", "regions"
EMBEDDINGS = ("visual_embedding", "text_embedding")
PARTS = ("visual_parts", "text_parts")
VOCABULARY = "vocabulary"
TWIN = "momentum_"
"""Prefix of the name of a stream or field that a momentum twin computes."""


def embedding_of(segment: str) -> str:
    """The field with the contrastive embeddings of a text segment that is not the clean one, fp32 ``[R, P]``."""
    return f"{segment}/embedding"


REGION_EMBEDDINGS = ("regions/visual_embedding", embedding_of(REGIONS))
"""The fields with the contrastive embeddings of regions and of what is said of them, fp32 ``[R, P]``."""

_STREAMS = frozenset({"visual", "text", "fused", "generation"})


@dataclass(frozen=True)
class Join:
    """Rows that put a text beside what it looks at.

    Attributes:
        text: Segment of the text stream. A causal join reads its ``{text}/token_ids`` directly, without the text
            encoder.
        sees: Segment of the visual stream that the text looks at, or several, concatenated. A causal join may also name
            a fused join of the same demands: its text looks at that join's rows, without their padding.
        mask: Which positions of the text a position sees: all (``both``) or the earlier ones (``causal``).
        drawn: The side that the objective's ``draw`` replaces by other samples: the text, or what it ``sees``.
        times: Texts of each sample, one behind the other. Causal joins only.
        length: Positions of its texts; None: as many as those of the batch's texts. Causal joins only.
        continues: Whether its texts are the batch's own with another first token and without their ends, so that a
            causal text encoder has their states already. Causal joins only.
    """

    text: str = CLEAN
    sees: str | tuple[str, ...] = CLEAN
    mask: Literal["both", "causal"] = "both"
    drawn: Literal["text", "sees"] | None = None
    times: int = 1
    length: int | None = None
    continues: bool = False

    @property
    def seen(self) -> tuple[str, ...]:
        """The segments that the text looks at."""
        return (self.sees,) if isinstance(self.sees, str) else self.sees


@dataclass(frozen=True)
class Demands:
    """What an objective needs from the chain on one kind of batch.

    Names of segments and joins begin with the objective's key, ``{key}`` or ``{key}/...``; ``clean`` is shared by all.

    Attributes:
        rows: Rows of each segment that a stack has to pass, by stream (``visual``, ``text``, ``language``). A visual
            segment reads ``{segment}/rows`` int64 ``[M]`` and ``{segment}/mask`` bool ``[M, T, N]`` from
            ``Batch.prepared``, a text segment ``{segment}/token_ids`` int64 ``[M, L]``, rows 0 .. M - 1 of the batch, a
            segment of ``language`` these, ``{segment}/mask`` bool ``[M, L]`` and in training ``{segment}/targets``; it
            leaves ``logits/{segment}``. Clean rows need not be named if a join or a field in ``reads`` implies them.
        joins: Fused and generated rows by name.
        reads: Fields that ``loss`` reads besides the rows above: ``visual`` and ``text`` (the clean rows, all
            positions), ``visual_embedding``, ``text_embedding``, ``logit_scale``, ``{segment}/embedding`` (of a text
            segment of its own; see ``embedding_of``), ``fused_visual`` (the visual
            positions of its own joins' rows), ``pooled`` (its own joins' rows, each as a whole; without
            ``fused_visual`` beside it, nothing else of these rows), ``queries`` (of the clean visual rows),
            ``interleaved`` (the rows of ``language`` look at the clean visual rows),
            ``vocabulary`` (the head that all objectives on words share); with the prefix ``momentum_``, the same field
            computed by the momentum twin. ``momentum_visual_parts`` and ``momentum_text_parts`` are the twins'
            projections of every position of the clean rows but the first. ``momentum_fused`` are the objective's own
            joins' rows, with the same inputs; no twin computes the joins of other objectives.
        draws_from: Fields that ``draw`` reads, without a gradient.
        resting: Those of ``reads`` that the loss gives no gradient. What nobody else trains of them is frozen.
        regions: Texts about regions of each picture; 0: the segments ``regions`` are not read. They are shared as the
            clean ones are, so that all objectives of a step that read them have the same number.
    """

    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    joins: Mapping[str, Join] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    draws_from: frozenset[str] = frozenset()
    resting: frozenset[str] = frozenset()
    regions: int = 0

    @property
    def fields(self) -> frozenset[str]:
        """All fields that are read, with or without a gradient."""
        return self.reads | self.draws_from

    @property
    def trained(self) -> frozenset[str]:
        """The fields whose layers a loss trains: ``reads``, and ``text_embedding`` by those of own texts."""
        own, learning = {embedding_of(segment) for segment in self.rows.get("text", {})}, self.reads - self.resting
        return learning if learning.isdisjoint(own) else learning | {"text_embedding"}

    @property
    def joined(self) -> frozenset[str]:
        """The segments that fused rows consist of."""
        fused = [join for join in self.joins.values() if join.mask == "both"]
        return frozenset(segment for join in fused for segment in (join.text, *join.seen))

    @property
    def twins(self) -> frozenset[str]:
        """The streams whose momentum twins have to run."""
        names = (name.removeprefix(TWIN) for name in self.fields if name.startswith(TWIN))
        wanted = {name.removesuffix("_embedding").removesuffix("_parts") for name in names}
        return frozenset(wanted | ({"visual", "text"} if "fused" in wanted else set())) & _STREAMS

    @property
    def writes_from_fused(self) -> bool:
        """Whether generated texts look at fused rows."""
        return any(join.mask == "causal" and join.seen[0] in self.joins for join in self.joins.values())

    @property
    def streams(self) -> frozenset[str]:
        """The streams that an architecture has to have; rows that are only joined need no stream."""
        found = {stream for stream, segments in self.rows.items() if segments.keys() - self.joined}
        found |= {"generation" if join.mask == "causal" else "fused" for join in self.joins.values()}
        found |= {"fused_generation"} if self.writes_from_fused else frozenset()
        found |= {"regions"} if self.regions else frozenset()
        found |= {"masked_visual"} if self.rows.get("visual") else frozenset()
        names = {name.removeprefix(TWIN) for name in self.fields}
        found |= {"embedding" for name in names if name in (*EMBEDDINGS, *REGION_EMBEDDINGS, *PARTS, "logit_scale")}
        own = names & (_STREAMS | {"fused_visual", "queries", "interleaved"})
        return frozenset(found | own | (self.reads & {TWIN + "fused"}))
