"""The layer that makes rows of a text and the visual features that it looks at. It knows no objective by name.

Shapes: B samples of this replica, S visual positions, L text positions, D hidden size,
R fused rows.

No visual feature of this replica is copied, however many texts look at it: each fused row names its row of ``memory``.
Of other replicas' samples only those that were drawn are fetched: joined, they would not fit at 512 replicas.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnivl.chain.chain import ChainLayer
from omnivl.chain.demands import CLEAN, REGIONS, TWIN, Join
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Drawn, Objective
from omnivl.chain.state import State, StepLayout, joined, part
from omnivl.errors import ModelError
from omnivl.parts.embed import encoded_rows

_STREAMS = (
    *("visual", "text", "text_mask", "visual_mask", "visual_input", "text_input"),
    *("regions", "regions_mask"),
)


class JoinRows(ChainLayer):
    """Makes fused rows of the encoders' streams, and keeps the rows of streams that losses read.

    Reads ``visual``, ``text``, ``text_mask`` (where inputs are joined, ``visual_input`` and ``text_input``) and what
    the objectives' ``draw`` reads. Drops the streams and adds

    - ``{stream}/{segment}`` of every segment that is not joined, and of clean rows that a loss reads;
    - ``memory``, whose rows 0 .. B - 1 are this replica's samples (then those that an objective has drawn from other
      replicas, and segments of other names that a text looks at);
    - ``generation_memory``, if generated row i does not look at row i of ``memory`` for every i;
    - ``fused``, ``fused_mask``, ``fused_memory``; if rows are concatenated, ``fused [R, L + S, D]`` holds the text,
      then the visual features;
    - ``momentum_fused``, ``momentum_fused_memory`` and ``momentum_memory``, if a loss reads the first;
    - ``memory_mask`` and ``momentum_memory_mask``, if visual rows have padding;
    - fields that the objectives' ``draw`` returns.

    In a step that predicts, ``join/rows`` int64 ``[R]`` may name the row of ``memory`` of each text; by default text i
    goes with row i.
    """

    stack = "join"

    def __init__(
        self,
        objectives: Sequence[Objective],
        gather: Gather | None = None,
        *,
        joins_inputs: bool = False,
        concatenates: bool = False,
    ) -> None:
        """Describes the layer; it has no parameters.

        Args:
            objectives: The stage's objectives, whose ``draw`` is called.
            gather: How to see the other replicas; None for a single one.
            joins_inputs: Whether the encoders' inputs are joined, instead of their outputs.
            concatenates: Whether fused rows hold the visual features as well.
        """
        super().__init__()
        self.objectives = {objective.key: objective for objective in objectives}
        self.gather: Gather = LocalGather() if gather is None else gather
        self.joins_inputs, self.concatenates = joins_inputs, concatenates

    def acts(self, layout: StepLayout) -> bool:
        """Whether anything is read after the encoders."""
        return layout.mode != "encode" and bool(layout.visual or layout.text)

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        found = self._kept(state)
        if layout.fused or layout.generation:
            found |= self._joined(state)
        twins = tuple(name for name in ("momentum_visual", "momentum_text") if name not in layout.reads)
        return state.merged(found, drop=_STREAMS + twins)

    def _kept(self, state: State) -> dict[str, Tensor]:
        """The rows of streams that losses read unjoined."""
        layout, found = state.layout, dict[str, Tensor]()
        for stream in ("visual", "text"):
            segments = layout.segments(stream)
            first = encoded_rows(layout, stream).start if self.joins_inputs else 0
            for name in segments:
                if not (stream in layout.fields if name == CLEAN else name not in layout.joined):
                    continue
                if stream == "text" and (name in layout.embedded_texts or name == REGIONS):
                    continue
                own = slice(segments[name].start - first, segments[name].stop - first)
                found[f"{stream}/{name}"] = part(state[stream], own)
        for stream, segments in layout.twins.items():
            if TWIN + stream in layout.reads and CLEAN in segments and len(segments) > 1:
                found[TWIN + stream] = part(state[TWIN + stream], segments[CLEAN])
        if not layout.fields.isdisjoint({"text", f"{TWIN}text_parts"}):
            found[f"text_mask/{CLEAN}"] = part(state["text_mask"], layout.text[CLEAN])
        return found

    def _joined(self, state: State) -> dict[str, Tensor]:
        """``memory`` and the fused rows, segment by segment."""
        layout, sides = state.layout, self.sides(state)
        drawn = self._draw(state)
        found = {name: tensor for one in drawn.values() for name, tensor in one.leaves.items()}
        memory = self._memory(sides, layout.joins, drawn)
        rows = self._rows(sides, {name: layout.joins[name] for name in layout.fused}, drawn, memory)
        if "fused" in layout.twins:
            found |= self._momentum(state, drawn)
        found |= self._written(layout, memory, sides)
        if memory.features:
            found |= memory.stacked("memory")
        if not rows:
            return found
        found["fused"] = joined([text for text, _, _ in rows])
        found["fused_mask"] = joined([mask for _, mask, _ in rows])
        looked_at = state.get("join/rows")
        found["fused_memory"] = joined([one for _, _, one in rows]) if looked_at is None else looked_at
        return self._concatenated(found) if self.concatenates else found

    def _memory(self, sides: "Sides", joins: Mapping[str, Join], drawn: Mapping[str, Drawn]) -> "_Memory":
        """The visual features that joins look at, clean rows first."""
        memory = _Memory(sides)
        if any(join.seen == (CLEAN,) for join in joins.values()):
            memory.first_of((CLEAN,))
        return memory

    def _rows(
        self, sides: "Sides", joins: Mapping[str, Join], drawn: Mapping[str, Drawn], memory: "_Memory"
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Text, mask and row of memory of the fused rows of each join."""
        rows = []
        for name, join in joins.items():
            text, mask = sides.text[join.text], sides.mask[join.text]
            looked_at = memory.rows_of(join.seen, len(text), of_regions=join.text == REGIONS)
            if join.drawn is not None:
                assert name.split("/")[0] in drawn, f"nobody draws for the join {name}"
                choice, rows_of_all = drawn[name.split("/")[0]], None
                if choice.across and self.gather.replicas > 1:
                    rows_of_all = in_replica_order(choice.rows[name], len(text), self.gather)
                first = memory.first_of(join.seen)
                if join.drawn == "text":
                    text, mask = self._taken((text, mask), choice.rows[name], rows_of_all)
                elif rows_of_all is None:
                    looked_at = choice.rows[name] + first if first else choice.rows[name]
                else:
                    looked_at = memory.added(*self.gather.fetch(sides.seen(*join.seen), rows_of_all))
            rows.append((text, mask, looked_at))
        return rows

    @torch.no_grad()
    def _momentum(self, state: State, drawn: Mapping[str, Drawn]) -> dict[str, Tensor]:
        """The fused rows of the momentum twins' streams, with the same samples drawn."""
        layout = state.layout
        joins = {name: layout.joins[name] for name in layout.twins["fused"]}
        drawn = {key: one for key, one in drawn.items() if any(name.split("/")[0] == key for name in joins)}
        visual, text = (
            {name: part(state[f"{TWIN}{stream}"], rows) for name, rows in layout.twins[stream].items()}
            for stream in ("visual", "text")
        )
        sides = Sides(
            visual,
            text,
            {name: part(state["text_mask"], layout.text[name]) for name in text},
            _visual_masks(state, layout, visual),
        )
        memory = self._memory(sides, joins, drawn)
        rows = self._rows(sides, joins, drawn, memory)
        return {
            "momentum_fused": joined([text for text, _, _ in rows]),
            "momentum_fused_memory": joined([looked_at for _, _, looked_at in rows]),
            **memory.stacked("momentum_memory"),
        }

    def _written(self, layout: StepLayout, memory: "_Memory", sides: "Sides") -> dict[str, Tensor]:
        """``generation_memory``, if it is needed."""
        starts, start = dict[str, int](), 0
        for name in layout.written_from:
            starts[name], start = start, start + layout.fused[name].stop - layout.fused[name].start
        places: list[Tensor] = []
        for join in (layout.joins[name] for name in layout.generation):
            if join.seen[0] in starts:
                text = sides.text[layout.joins[join.seen[0]].text]
                own = torch.arange(len(text), device=text.device) + starts[join.seen[0]]
            elif join.seen[0] in layout.visual:
                own = memory.rows_of(join.seen, layout.batch_size)
            else:
                continue
            places.append(own.repeat_interleave(join.times) if join.times > 1 else own)
        several = len(places) > 1 or any(layout.joins[name].times > 1 for name in layout.generation)
        return {"generation_memory": torch.cat(places)} if places and several else {}

    def sides(self, state: State) -> "Sides":
        """The rows to join, by segment."""
        layout, suffix = state.layout, "_input" if self.joins_inputs else ""
        visual = {name: part(state[f"visual{suffix}"], rows) for name, rows in layout.visual.items()}
        visual |= {REGIONS: state["regions"]} if layout.regions else {}
        texts = {name: rows for name, rows in layout.text.items() if name in layout.joined}
        text = {name: part(state[f"text{suffix}"], rows) for name, rows in texts.items()}
        masks = {name: part(state["text_mask"], rows) for name, rows in texts.items()}
        return Sides(visual, text, masks, _visual_masks(state, layout, visual))

    @torch.no_grad()
    def _draw(self, state: State) -> Mapping[str, Drawn]:
        """What the objectives draw, by their keys."""
        layout = state.layout
        drawing = [name.split("/")[0] for name in layout.fused if layout.joins[name].drawn is not None]
        return {key: self.objectives[key].draw(state, self.gather) for key in dict.fromkeys(drawing)}

    def _taken(self, sides: Sequence[Tensor], rows: Tensor, rows_of_all: Tensor | None) -> list[Tensor]:
        """Rows of this replica's samples, or of all replicas'."""
        if rows_of_all is None:
            return [side[rows] for side in sides]
        return self.gather.fetch(sides, rows_of_all)

    def _concatenated(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fused rows with the visual features appended."""
        seen = found["memory"].index_select(0, found["fused_memory"])
        if "memory_mask" in found:
            is_seen = found["memory_mask"].index_select(0, found["fused_memory"])
        else:
            is_seen = found["fused_mask"].new_ones(seen.shape[:2])
        return found | {
            "fused": torch.cat([found["fused"], seen], dim=1),
            "fused_mask": torch.cat([found["fused_mask"], is_seen], dim=1),
        }


def in_replica_order(rows: Tensor, count: int, gather: Gather) -> Tensor:
    """Places among the joined samples, ``count`` of each replica, of rows that count from this replica's on."""
    return (rows + gather.replica * count) % (gather.replicas * count)


@dataclass(frozen=True)
class Sides:
    """Rows to join by segment.

    Attributes:
        visual: ``[M, S, D]``.
        text: ``[M, L, D]``.
        mask: Of the texts, bool ``[M, L]``.
        visual_mask: Of the visual rows, bool ``[M, S]``; empty where they have no padding.
    """

    visual: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    mask: Mapping[str, Tensor]
    visual_mask: Mapping[str, Tensor]

    def seen(self, *names: str) -> list[Tensor]:
        """The visual rows of segments, position by position end to end, and their mask where there is one."""
        return [
            torch.cat([rows[name] for name in names], dim=1) if len(names) > 1 else rows[names[0]]
            for rows in (self.visual, self.visual_mask)
            if rows
        ]


def _visual_masks(state: State, layout: StepLayout, names: Collection[str]) -> dict[str, Tensor]:
    masks = {}
    if "visual_mask" in state:
        masks = {name: part(state["visual_mask"], layout.visual[name]) for name in names if name in layout.visual}
    if REGIONS in names:
        masks |= {REGIONS: state["regions_mask"]}
    return masks


class _Memory:
    """The visual features that texts look at, one below the other in the order in which they are asked for."""

    def __init__(self, sides: Sides) -> None:
        self.sides, self.features, self.masks = sides, list[Tensor](), list[Tensor]()
        self._start: dict[tuple[str, ...], int] = {}
        self._ranges: dict[tuple[int, int], Tensor] = {}

    def added(self, features: Tensor, *mask: Tensor) -> Tensor:
        """int64 ``[n]``: the rows of features ``[n, S, D]``, which are appended, maybe with their mask."""
        return self._range(self._append(features, *mask), len(features))

    def first_of(self, seen: tuple[str, ...]) -> int:
        """The first of the rows of memory that hold segments, concatenated, which are appended if they are not yet."""
        if seen not in self._start:
            self._start[seen] = self._append(*self.sides.seen(*seen))
        return self._start[seen]

    def rows_of(self, seen: tuple[str, ...], count: int, *, of_regions: bool = False) -> Tensor:
        """int64 ``[count]``: the rows of memory that hold the first samples of the segments, concatenated.

        Args:
            seen: The segments.
            count: How many; texts ``of_regions`` are several for each picture, one behind the other.
            of_regions: See ``count``.
        """
        if of_regions and REGIONS not in seen:
            pictures = len(self.sides.visual[seen[0]])
            return self._range(self.first_of(seen), pictures).repeat_interleave(count // pictures)
        return self._range(self.first_of(seen), count)

    def _append(self, features: Tensor, *mask: Tensor) -> int:
        start = sum(map(len, self.features))
        self.features.append(features)
        self.masks.extend(mask)
        return start

    def _range(self, start: int, count: int) -> Tensor:
        """int64 ``[count]``, made once: nobody writes to it."""
        if (start, count) not in self._ranges:
            self._ranges[start, count] = torch.arange(start, start + count, device=self.features[0].device)
        return self._ranges[start, count]

    def stacked(self, name: str) -> dict[str, Tensor]:
        """All of it, ``[R_memory, S, D]``, by a name, and its mask, bool ``[R_memory, S]``, as ``{name}_mask``.

        Raises:
            ModelError: The rows have different lengths.
        """
        lengths = {features.shape[1] for features in self.features}
        if len(lengths) > 1:
            raise ModelError(
                f"texts of one step look at {' and '.join(map(str, sorted(lengths)))} visual positions; allowed is one "
                "number; put the objectives into stages or data entries of their own"
            )
        parts = {name: self.features} | ({f"{name}_mask": self.masks} if self.masks else {})
        return {key: joined(own) for key, own in parts.items()}
