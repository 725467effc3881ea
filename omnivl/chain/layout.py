"""Computes the ``StepLayout`` of a step from the objectives' demands."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from omnivl.chain.demands import CLEAN, PARTS, REGIONS, TWIN, Demands, Join, embedding_of
from omnivl.chain.objective import Objective
from omnivl.chain.regions import region_rows
from omnivl.chain.state import Mode, StepLayout
from omnivl.data.batch import DataKind
from omnivl.errors import ModelError


def plan_layout(
    objectives: Sequence[Objective], kind: DataKind, batch_size: int, num_frames: int, entry: str = ""
) -> StepLayout:
    """Computes the layout of a training step. A pure function, so that every pipeline stage gets the same.

    Args:
        objectives: The stage's objectives, in the plan's order, which is also the order of segments.
        kind: Kind of the batch.
        batch_size: B.
        num_frames: T, 1 for images.
        entry: Name of the data entry that the batch comes from.

    Raises:
        ModelError: Two objectives claim a segment of the same name.
    """
    acting = [objective for objective in objectives if objective.acts_on(entry)]
    asked = {objective.key: objective.demands(kind, batch_size) for objective in acting}
    return lay_out(asked, kind, batch_size, num_frames, "train")


def lay_out(
    asked: Mapping[str, Demands | None], kind: DataKind, batch_size: int, num_frames: int, mode: Mode
) -> StepLayout:
    """The layout of a step that computes some demands, given by the keys of their objectives.

    Raises:
        ModelError: Two demands name the same segment or join, or generated texts of one step look at different things
            or have different lengths, or demands differ in their number of regions.
    """
    active = {key: demands for key, demands in asked.items() if demands is not None}
    learning: StepLayout | None = None
    if any(demands.resting for demands in active.values()):
        awake = {
            key: replace(demands, reads=demands.reads - demands.resting, resting=frozenset())
            for key, demands in active.items()
        }
        learning = lay_out(awake, kind, batch_size, num_frames, mode)
    stacks = {stream: _Stack(kind) for stream in ("visual", "text", "fused", "generation", "language")}
    joins: dict[str, Join] = {}
    regions = _agreed_regions(active)
    if any(_reads_clean(demands, "visual") for demands in active.values()):
        stacks["visual"].add(CLEAN, batch_size)
    if any(_reads_clean(demands, "text") for demands in active.values()):
        stacks["text"].add(CLEAN, batch_size)
    stacks["text"].add(REGIONS, region_rows(batch_size, regions))
    for demands in active.values():
        for stream, segments in demands.rows.items():
            for segment, rows in segments.items():
                stacks[stream].add(segment, rows)
        for name, join in demands.joins.items():
            shared = region_rows(batch_size, regions) if join.text == REGIONS else batch_size
            rows = join.times * demands.rows.get("text", {}).get(join.text, shared)
            stacks["generation" if join.mask == "causal" else "fused"].add(name, rows)
            joins[name] = join
    _check_written(stacks["generation"].segments, joins)
    fused = {name: demands for demands in active.values() for name in demands.joins if name in stacks["fused"].segments}
    return StepLayout(
        kind=kind,
        batch_size=batch_size,
        num_frames=num_frames,
        mode=mode,
        **{stream: stack.segments for stream, stack in stacks.items()},
        joins=joins,
        reads=frozenset[str]().union(*(demands.reads for demands in active.values())),
        fused_text=tuple(name for name, demands in fused.items() if _reads_words(demands)),
        fused_visual=tuple(name for name, demands in fused.items() if "fused_visual" in demands.reads),
        draws_from=frozenset[str]().union(*(demands.draws_from for demands in active.values())),
        twins=_twins(active.values(), stacks, kind),
        objectives=tuple(active),
        regions=regions,
        class_only=not any(_reads_all_positions(demands) for demands in active.values()),
        patches=None,
        learning=learning,
    )


def _twins(
    active: Collection[Demands], stacks: Mapping[str, "_Stack"], kind: DataKind
) -> dict[str, Mapping[str, slice]]:
    """The segments that momentum twins compute, by stream, in the order of the stream's own."""
    wanted: dict[str, set[str]] = {"visual": set(), "text": set(), "fused": set()}
    for demands in active:
        for stream in ("visual", "text"):
            if not demands.fields.isdisjoint(TWIN + stream + ending for ending in ("", "_embedding", "_parts")):
                wanted[stream].add(CLEAN)
        if TWIN + "fused" in demands.reads:
            for name, join in demands.joins.items():
                if join.mask == "both":
                    wanted["fused"].add(name)
                    wanted["visual"].update(join.seen)
                    wanted["text"].add(join.text)
    found: dict[str, Mapping[str, slice]] = {}
    for stream, names in wanted.items():
        stack = _Stack(kind)
        for name, rows in stacks[stream].segments.items():
            if name in names:
                stack.add(name, rows.stop - rows.start)
        if stack.segments:
            found[stream] = stack.segments
    return found


def present_modalities(layout: StepLayout) -> tuple[str, ...]:
    """The modalities that have tokens in a step, of ``MODALITIES``."""
    visual = ("video" if layout.is_video else "image",) if layout.visual else ()
    reads_text = layout.text or layout.fused or layout.generation or layout.language
    return (*visual, "text") if reads_text else visual


def _agreed_regions(active: Mapping[str, Demands]) -> int:
    """The number of regions that the demands of a step share; 0: none reads any.

    Raises:
        ModelError: They differ.
    """
    asked = {key: demands.regions for key, demands in active.items() if demands.regions}
    first = next(iter(asked), "")
    for key, regions in asked.items():
        if regions != asked[first]:
            raise ModelError(
                f"objectives {first!r} and {key!r} read {asked[first]} and {regions} regions of a picture in one step; "
                "allowed is one number; make their regions equal, or put them on data entries of their own"
            )
    return asked.get(first, 0)


def _check_written(written: Collection[str], joins: Mapping[str, Join]) -> None:
    """Refuses generated rows that cannot be stacked.

    Raises:
        ModelError: See ``lay_out``.
    """
    kinds = {name: (joins[name].length, joins[name].seen[0] in joins) for name in written}
    first = next(iter(kinds), "")
    for name, own in kinds.items():
        if own != kinds[first]:
            what = "lengths" if own[0] != kinds[first][0] else "things to look at: a picture, and a text beside one"
            raise ModelError(
                f"texts that {first.split('/')[0]!r} and {name.split('/')[0]!r} write in one step have different "
                f"{what}; put the objectives into stages or data entries of their own"
            )


def _reads_clean(demands: Demands, stream: str) -> bool:
    """Whether the clean rows of an encoder are needed. The twins read the clean input."""
    own = (stream, f"{stream}_embedding", f"{stream}_parts")
    if any(field.removeprefix("momentum_") in own for field in demands.fields):
        return True
    if stream == "visual":
        if demands.regions:
            return True
        gathered = not demands.fields.isdisjoint(("queries", "interleaved"))
        return gathered or any(CLEAN in join.seen for join in demands.joins.values())
    return any(join.text == CLEAN for join in demands.joins.values() if join.mask == "both")


def _reads_all_positions(demands: Demands) -> bool:
    """Whether more than the first position of some encoder's rows is read. Of texts that are embedded none is."""
    fields = {field.removeprefix("momentum_") for field in demands.reads}
    own = any(
        stream != "text" or embedding_of(segment) not in demands.reads
        for stream, segments in demands.rows.items()
        for segment in segments
    )
    return bool(
        demands.joins or demands.regions or own or fields & {"visual", "text", "fused_visual", "queries", *PARTS}
    )


def _reads_words(demands: Demands) -> bool:
    """Whether the text's positions of fused rows are read, and not only each row as a whole."""
    return "pooled" not in demands.reads or "fused_visual" in demands.reads


class _Stack:
    """Concatenates segments."""

    def __init__(self, kind: DataKind) -> None:
        self.kind, self.segments, self.rows = kind, dict[str, slice](), 0

    def add(self, name: str, rows: int) -> None:
        if rows == 0:
            return
        if name in self.segments:
            raise ModelError(
                f"objectives on {self.kind}: two of them claim the stacked rows {name!r}; give one of them another "
                "'name', or remove it"
            )
        self.segments[name] = slice(self.rows, self.rows + rows)
        self.rows += rows
