"""The work of one shard: draws its icons, writes it, and leaves a description beside it."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omnivl.data.convert.entry import sample_key
from omnivl.data.emoji.iconify import Icon
from omnivl.data.emoji.shards import ShardSample, WrittenShard, write_shard
from omnivl.data.icons.draw import Cause, UndrawableError, draw_icon

NO_ICON = -1
COUNTED = ("set", "license", "hand", "split")
PARTS = "parts"
"""Folder of the descriptions, until all shards are there."""


@dataclass(frozen=True)
class IconTask:
    """One icon.

    Attributes:
        name: Its name in the set.
        icon: What to draw.
        fields: Its JSON, without what is known only when it is drawn.
    """

    name: str
    icon: Icon
    fields: Mapping[str, object]


@dataclass(frozen=True, eq=False)
class ShardJob:
    """One shard.

    Attributes:
        prefix: The set.
        path: File to write.
        icons: In order.
        size: Side of the pictures in pixels.
        seed: Of the colours.
    """

    prefix: str
    path: Path
    icons: tuple[IconTask, ...]
    size: int
    seed: int

    @property
    def part(self) -> Path:
        """Where the description is written."""
        return self.path.parent / PARTS / f"{self.path.name}.json"


@dataclass(frozen=True)
class Refusal:
    """An icon, or a whole set, that is not among the samples.

    Attributes:
        where: ``SET:NAME``.
        cause: Why, from a fixed list.
        detail: What exactly was found.
    """

    where: str
    cause: Cause
    detail: str


@dataclass(frozen=True)
class Part:
    """What became of a shard.

    Attributes:
        shard: The file; None if none of its icons could be drawn.
        refusals: Icons that are not in it.
        counts: Samples by each of ``COUNTED`` fields, as ``FIELD:VALUE``.
        seconds: CPU time; 0 for a shard of an earlier, interrupted build.
    """

    shard: WrittenShard | None
    refusals: tuple[Refusal, ...]
    counts: Mapping[str, int]
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> str:
        """The description: the same for the same shard."""
        shard = None if self.shard is None else asdict(self.shard)
        refusals = [asdict(one) for one in self.refusals]
        return json.dumps({"shard": shard, "refusals": refusals, "counts": self.counts}, ensure_ascii=False)


def run_job(job: ShardJob, given_up: Mapping[int, Refusal], mark: Callable[[int], None]) -> Part:
    """Draws and writes a shard. Neither the shard nor its description is there before it is complete.

    Args:
        job: Which one.
        given_up: Icons that are not tried again, by their place.
        mark: Told the place of the icon that is drawn next, and ``NO_ICON`` after the last one.
    """
    start = time.process_time()
    samples: list[ShardSample] = []
    refusals: list[Refusal] = []
    for place, task in enumerate(job.icons):
        mark(place)
        if place in given_up:
            refusals.append(given_up[place])
            continue
        try:
            drawn = draw_icon(task.icon, job.size, job.seed, job.prefix, task.name)
        except UndrawableError as error:
            refusals.append(Refusal(f"{job.prefix}:{task.name}", error.cause, error.detail[:500]))
            continue
        fields = {**task.fields, **drawn.fields()}
        samples.append(ShardSample(sample_key(f"{job.prefix}_{task.name}"), "webp", drawn.webp, fields))
    mark(NO_ICON)
    counts = Counter(f"{name}:{sample.fields[name]}" for sample in samples for name in COUNTED)
    shard = _write(job.path, samples) if samples else None
    part = Part(shard, tuple(refusals), dict(sorted(counts.items())), time.process_time() - start)
    job.part.parent.mkdir(exist_ok=True)
    replace_file(job.part, part.to_json())
    return part


def _write(path: Path, samples: Sequence[ShardSample]) -> WrittenShard:
    partial = path.with_name(f".{path.name}.partial")
    written = write_shard(partial, samples)
    partial.replace(path)
    return replace(written, name=path.name)


def read_part(job: ShardJob) -> Part | None:
    """What an interrupted build left of a shard; None if it has to be made."""
    try:
        described: dict[str, Any] = json.loads(job.part.read_text(encoding="utf-8"))
        shard = None if described["shard"] is None else WrittenShard(**described["shard"])
        refusals = tuple(Refusal(**one) for one in described["refusals"])
        counts = {str(name): int(count) for name, count in described["counts"].items()}
        whole = shard is None or job.path.stat().st_size == shard.bytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Part(shard, refusals, counts) if whole else None


def replace_file(path: Path, text: str) -> None:
    """Writes a text so that the file is either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
