"""The values of a field over all samples of shards: lists of answers or classes for a plan.

Texts alone are read, no picture and no clip.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from omnivl.data.formats import TEXT_EXTENSIONS
from omnivl.data.index import ShardIndex
from omnivl.data.index_file import load_index
from omnivl.data.record import Record, parse_record
from omnivl.data.sources import is_stream
from omnivl.data.sources.emoji import EMBEDDED, embedded_shards
from omnivl.data.sources.generated import GENERATED
from omnivl.data.sources.patterns import expand_pattern
from omnivl.data.sources.presence import unreadable_shards, why_unreadable
from omnivl.errors import DataError


def count_values(sources: Sequence[str], field: str) -> Counter[str]:
    """How often each value of a field stands in the samples; of a list every entry counts. ``label`` is the class.

    Args:
        sources: Shards: paths, folders, globs or brace patterns; ``emoji`` or ``emoji_hands``.
        field: Name of a field of the samples' JSON.

    Raises:
        DataError: A source is none of these, cannot be read, or no sample has such a field.
    """
    counts: Counter[str] = Counter()
    for source in sources:
        for record in _records(source):
            counts.update(_texts(record.label if field == "label" else record.meta.get(field), field))
    if not counts:
        raise DataError(
            f"no sample of {', '.join(sources)} has a text or a number in its field {field!r}; allowed: a field of the "
            "samples' JSON, as `omnivl data inspect` lists them; name another one"
        )
    return counts


def most_frequent(counts: Counter[str], least: int = 1, most: int | None = None) -> list[str]:
    """The values that stand there ``least`` times or more, the ``most`` frequent first; equal ones by the alphabet."""
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    return [value for value in ranked if counts[value] >= least][:most]


def _records(source: str) -> Iterator[Record]:
    """The texts and fields of all samples.

    Raises:
        DataError: See ``count_values``.
    """
    if is_stream(source) or source in GENERATED:
        kind = "a stream" if is_stream(source) else "generated"
        raise DataError(f"{source}: it is {kind}; allowed are shards on a disk; name them")
    shards = embedded_shards(source) if source in EMBEDDED else expand_pattern(source)
    missing = [(shard, why_unreadable(shard) or "") for shard in shards if not Path(shard).is_file()]
    if missing:
        raise unreadable_shards(source, missing, len(shards))
    for shard in shards:
        yield from _records_of(shard, load_index(Path(shard), shard, cache=None))


def _records_of(shard: str, index: ShardIndex) -> Iterator[Record]:
    with Path(shard).open("rb") as file:
        for key, spans in zip(index.keys, index.text.tolist(), strict=True):
            members = {
                name: os.pread(file.fileno(), size, offset)
                for name, (offset, size) in zip(TEXT_EXTENSIONS, spans, strict=True)
                if size >= 0
            }
            yield parse_record(members, f"{shard}:{key}")


def _texts(value: object, field: str) -> Iterator[str]:
    """The texts of a value: one, or those of a list.

    Raises:
        DataError: One has several lines, which a list of one text on each line cannot hold.
    """
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str | int | float) or isinstance(one, bool) or not str(one).strip():
            continue
        if len(str(one).splitlines()) > 1:
            raise DataError(f"a value of {field!r} has several lines: {one!r}; allowed: texts of one line; mend it")
        yield str(one)
