"""Looks at the sources of training and evaluation.

The only place that opens sources of a plan that is not being trained is ``Glances``.
"""

import time
from pathlib import Path as FilePath

from engine.plan.plan import Plan, StagePlan
from engine.plan.yaml import Path
from engine.run.preflight.findings import Finding, Look
from omnivl.chain.preparation import asked_fields
from omnivl.data.config import DataEntryConfig, entry_keys
from omnivl.data.example import ExampleReader
from omnivl.data.limits import DecodeLimits
from omnivl.data.quarantine import Quarantine
from omnivl.data.sources import is_stream, open_source
from omnivl.data.sources.base import SHARD_CAUSES, BadSampleError, NothingLeftError, Source
from omnivl.data.sources.glance import Glance, glance
from omnivl.errors import DataError
from omnivl.inference.pictures import EVALUATION_SEED, PictureSet
from omnivl.randomness import stable_hash
from omnivl.tasks import Task
from omnivl.tasks.pixel_baseline import MOST_REFERENCES
from omnivl.tasks.task import Samples

MOST_TRIED = 8
"""Samples of an entry of which one has to be usable, evenly spread; the same number of an evaluation's is read."""


MOST_SECONDS_IN_ALL = 60.0
"""Seconds after which only the presence of further sources is looked at."""


class Glances:
    """Opens sources for a look, each way of reading one once. One for all plans that are looked at together."""

    def __init__(self) -> None:
        """Opens nothing yet; the time for all of it begins."""
        self._end = time.monotonic() + MOST_SECONDS_IN_ALL
        self._seen: list[tuple[tuple[object, ...], Glance | DataError]] = []

    def at(
        self, entry: DataEntryConfig, stage: StagePlan, seed: int, index_cache: str | None, *, open_streams: bool
    ) -> Glance:
        """Opens a source for a look, or remembers how it looked before.

        Raises:
            DataError: See ``omnivl.data.sources.glance.glance``.
        """
        sizes = stage.model.inputs
        how = (
            *(entry.source, entry.kind, dict(entry.where), entry.text is None, entry.language, index_cache),
            *(entry.pictures, entry.least_pictures, sizes.num_frames, sizes.video_size, open_streams),
        )
        known = next((found for seen, found in self._seen if seen == how), None)
        if known is None:
            try:
                known = glance(
                    entry,
                    seed=seed,
                    index_cache=index_cache,
                    num_frames=sizes.num_frames,
                    size=sizes.video_size,
                    open_streams=open_streams,
                    seconds=self._end - time.monotonic(),
                )
            except DataError as error:
                known = error
            self._seen.append((how, known))
        if isinstance(known, DataError):
            raise known
        return known


class DataLook:
    """Looks at the sources of a plan's stages."""

    def __init__(
        self,
        plan: Plan,
        look: Look,
        glances: Glances,
        *,
        world_size: int,
        open_streams: bool,
        folder: FilePath | None,
    ) -> None:
        """Opens nothing yet.

        Args:
            plan: Without mistakes.
            look: Takes the findings.
            glances: Opens the sources.
            world_size: Number of processes.
            open_streams: Whether commands are run and addresses fetched.
            folder: Where the plan's file is, for advice; None if it is unknown.
        """
        self._plan, self._look, self._world_size = plan, look, world_size
        self._open_streams, self._folder, self._glances = open_streams, folder, glances

    def train(self, index: int) -> None:
        """Looks at the data entries of a stage."""
        stage = self._plan.stages[index]
        for place, (key, entry) in enumerate(zip(entry_keys(stage.data), stage.data, strict=True)):
            path: Path = ("stages", index, "data", place)
            seed = stable_hash(self._plan.seed, "data", index)
            found = self._found(path, entry, stage, seed)
            if found is None or found.source is None:
                continue
            with self._look.at((*path, "source")):
                self._judge((*path, "source"), entry, found, found.source)
            with self._look.at(path):
                self._try_samples(stage, key, entry, found.source, seed)
            self._compare_sizes(path, stage, found, found.source)

    def evaluate(self, index: int) -> None:
        """Looks at what the evaluation tasks of a stage read."""
        stage = self._plan.stages[index]
        for at, tasks in stage.evaluate.lists:
            for place, task in enumerate(tasks):
                self._evaluate(("stages", index, "evaluate", *at, place), stage, task)

    def _evaluate(self, path: Path, stage: StagePlan, task: Task) -> None:
        for samples in task.samples:
            entry, at = samples.entry, (*path, *samples.path[:-1])
            if is_stream(entry.source):
                with self._look.at((*at, "source")):
                    open_source(entry, seed=EVALUATION_SEED)
                continue
            found = self._found(at, entry, stage, EVALUATION_SEED)
            if found is None or found.source is None:
                continue
            if found.bad_shards:
                text = f"data source {entry.source!r}: {found.bad_shards[0]}; mend it, or leave it out of the source"
                self._look.problems.append(Finding((*at, "source"), text))
            with self._look.at(at):
                shown = (samples.source, samples.media, samples.where, stage.model.inputs)
                given = (MOST_TRIED, samples.reads, found.source, samples.pictures)
                pictures = PictureSet(*shown, *given)
                if samples.path == ("source",):
                    task.examine(pictures)
            self._note_thinned((*at, "max_samples"), samples, len(found.source))

    def _note_thinned(self, path: Path, samples: Samples, count: int) -> None:
        """Notes a baseline that gets fewer pictures than there are without the plan asking for it."""
        if samples.path != ("source",) and samples.max_samples == MOST_REFERENCES < count:
            text = (
                f"{count:,} samples, of which the baseline compares with {MOST_REFERENCES:,}: it is weaker than with "
                "all of them; raise max_samples, or lower it if that is meant"
            )
            self._look.notes.append(Finding(path, text))

    def _found(self, path: Path, entry: DataEntryConfig, stage: StagePlan, seed: int) -> Glance | None:
        """What a glance shows; None where there is nothing, which is a problem then."""
        try:
            cache = self._plan.loader.index_cache
            found = self._glances.at(entry, stage, seed, cache, open_streams=self._open_streams)
        except NothingLeftError as error:
            field = "where" if entry.where else "pictures" if entry.pictures else "source"
            self._look.problems.append(Finding((*path, field), str(error)))
            return None
        except DataError as error:
            self._look.problems.append(Finding((*path, "source"), f"{error}{self._beside(entry.source)}"))
            return None
        if not found.whole:
            text = f"data source {entry.source!r}: {found.left_out}"
            if found.source is None and found.looked_at and not is_stream(entry.source):
                text += f"; none of their samples is of kind {entry.kind} and passes 'where'"
            self._look.notes.append(Finding((*path, "source"), text))
        return found

    def _beside(self, source: str) -> str:
        """Advice where a source that is not there stands beside the plan."""
        if self._folder is None or not source.strip() or is_stream(source) or FilePath(source).is_absolute():
            return ""
        beside = self._folder / source
        try:
            there = beside.exists()
        except (OSError, ValueError):
            return ""
        return f". There is {beside}: paths are taken from the working folder, not from the plan's" if there else ""

    def _judge(self, path: Path, entry: DataEntryConfig, found: Glance, source: Source) -> None:
        """Refuses a source of which too much is bad, as the loader would, and notes what a run will leave out.

        Raises:
            DataError: Too many shards or samples are bad.
        """
        loader = self._plan.loader
        limits = Quarantine(max_bad_fraction=loader.max_bad_fraction, min_samples_to_judge=loader.min_samples_to_judge)
        rejections = list(source.rejections)
        if not found.whole:  # of the shards that were not looked at, all may be good
            rejections = [one for one in rejections if one.cause in SHARD_CAUSES]
        limits.record_source(entry.source, len(source), found.shards, rejections)
        if rejections:
            first, count = rejections[0], len(rejections)
            text = f"{count:,} bad sample{'s are' if count > 1 else ' is'} left out; the first: {first.where}: "
            self._look.notes.append(Finding(path, f"data source {entry.source!r}: {text}{first.detail}"))

    def _try_samples(self, stage: StagePlan, key: str, entry: DataEntryConfig, source: Source, seed: int) -> None:
        """Makes an example, as training does, of a few samples until one is good.

        Raises:
            DataError: None of them is.
        """
        loader = self._plan.loader
        reader = ExampleReader(
            entry,
            source,
            stage.model.inputs,
            key=key,
            seed=seed,
            limits=DecodeLimits(loader.max_pixels, loader.max_frames),
            training=False,
            asked=asked_fields(stage.objectives, entry.kind, key),
        )
        count = min(len(source), MOST_TRIED)
        first: BadSampleError | None = None
        for number in range(count):
            place = number * len(source) // count
            try:
                reader.finish(source.read(place), place)
            except BadSampleError as error:
                first = first or error
            else:
                return
        raise DataError(
            f"data source {entry.source!r}: none of {count} samples that were tried can be used; the first: {first}; "
            "mend them, or change what the entry reads of them"
        )

    def _compare_sizes(self, path: Path, stage: StagePlan, found: Glance, source: Source) -> None:
        """Notes a source that gives some of its samples several times to one micro-batch of all replicas."""
        size = stage.batch.micro_batch_size_per_gpu * stage.parallel.replicas(self._world_size)
        if found.whole and len(source) < size:
            text = f"{len(source):,} samples for micro-batches of {size:,} over all replicas: some occur more than once"
            self._look.notes.append(Finding((*path, "source"), text))
