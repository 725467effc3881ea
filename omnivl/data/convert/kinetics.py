"""Kinetics: a CSV ``label,youtube_id,time_start,time_end,split`` and a folder of cut clips."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av

from omnivl.data.container import open_container
from omnivl.data.convert.clips import find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record

_TOLERANCE = 2.0  # seconds by which cut clips exceed their span: tools cut at key frames
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class KineticsReader(FormReader):
    """Kinetics 400, 600, 700 and others of its form.

    A clip is looked for as ID_000010_000020, ID_10_20 (start and end in seconds) or ID, in any sub-folder. What is
    named by the identifier alone is the whole video, of which the row's seconds are cut out; but where only one row
    names it and it is no longer than those seconds, somebody has cut it already.

    Attributes:
        table: CSV with label, youtube_id, time_start, time_end, split.
        clips: Folder of the clips.

    Examples:
      omnivl data convert kinetics train.csv clips --out shards
    """

    form = "kinetics"
    title = "Kinetics"
    known = "label youtube_id time_start time_end split is_cc"

    table: Path
    clips: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """Rows in their order.

        Raises:
            DataError: A column is missing, or there are no clips.
        """
        clips = find_clips(self.clips)
        first = Reading(self.title, frozenset(self.known.split())).table(self.table, _COLUMNS)
        named = ((_identifier(row), _span(row)) for row in first)
        spans = {(identifier, span) for identifier, span in named if identifier in clips and span is not None}
        rows = Counter(identifier for identifier, _ in spans)
        return (partial(self._entry, record, clips, rows) for record in read.table(self.table, _COLUMNS))

    def _entry(self, record: Record, clips: Mapping[str, Path], rows: Mapping[str, int]) -> Entry:
        label, identifier, start, end = (str(record.get(column) or "").strip() for column in _COLUMNS)
        if not identifier:
            record.refuse("missing_media", "no youtube_id; complete or drop the row")
        if not label:
            record.refuse("missing_label", "no label; complete or drop the row (test lists come without)")
        span = _span(record)
        if span is None:
            detail = f"time_start {start!r} and time_end {end!r} are no span of seconds; mend the row"
            record.refuse("missing_media", detail)
        first, last = span
        names = (f"{identifier}_{first:06.0f}_{last:06.0f}", f"{identifier}_{first:g}_{last:g}", identifier)
        path = next((clips[name] for name in names if name in clips), None)
        if path is None:
            record.refuse("missing_media", f"no clip {' or '.join(names)} below {self.clips}")
        whole = path == clips.get(identifier) and (rows[identifier] > 1 or _length(path) > last - first + _TOLERANCE)
        return Entry(
            path=path,
            name=f"{names[0]}{path.suffix}",
            where=record.where,
            label=label,
            seconds=span if whole else None,
            split=self.split or str(record.get("split") or "").strip() or None,
            meta={"youtube_id": identifier, "time_start": first, "time_end": last},
        )


def _identifier(row: Record) -> str:
    return str(row.get("youtube_id") or "").strip()


def _span(row: Record) -> tuple[float, float] | None:
    """Start and end of a row in seconds; None where they are none."""
    try:
        first, last = (float(str(row.get(column))) for column in ("time_start", "time_end"))
    except ValueError:
        return None
    return (first, last) if 0 <= first < last < math.inf else None


def _length(path: Path) -> float:
    """Seconds of a clip by its header; 0 for what cannot be read, which is refused later by name."""
    try:
        with open_container(path.read_bytes()) as container:
            return float((container.duration or 0) / av.time_base)
    except (OSError, ValueError):
        return 0.0
