"""Kinetics: a CSV ``label,youtube_id,time_start,time_end,split`` and a folder of cut clips."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av

from omnivl.data.container import open_container
from omnivl.data.convert.clips import find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import read_csv
from omnivl.data.sources.base import Rejection

_TOLERANCE = 2.0  # seconds by which cut clips exceed their span: tools cut at key frames
_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class KineticsReader:
    """Reads one CSV of Kinetics 400/600/700 (or any data set in its form).

    A clip is looked for as ``ID_000010_000020``, ``ID_10_20`` (start and end in seconds) or ``ID``, in any sub-folder.
    What is named by the identifier alone is the whole video, of which the row's seconds are cut out; but where only one
    row names it and it is no longer than those seconds, somebody has cut it already.

    Attributes:
        table: The CSV.
        clips: Folder of the clips.
        split: Split of all samples; None for the CSV's own column, if it has one.
    """

    table: Path
    clips: Path
    split: str | None = None

    @property
    def form(self) -> str:
        """Name of the form."""
        return "kinetics"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The CSV and the clips."""
        return (self.table, self.clips)

    def count(self) -> int:
        """Lines of the CSV."""
        with self.table.open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)

    def entries(self) -> Iterator[Entry | Rejection]:
        """Rows in their order.

        Raises:
            DataError: A column is missing, or there are no clips.
        """
        clips = find_clips(self.clips)
        named = ((_identifier(row[1]), _span(row[1])) for row in self._good_rows())
        spans = {(identifier, span) for identifier, span in named if identifier in clips and span is not None}
        rows = Counter(identifier for identifier, _ in spans)
        for row in read_csv(self.table, _COLUMNS):
            yield row if isinstance(row, Rejection) else self._entry(*row, clips, rows)

    def _good_rows(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        return (row for row in read_csv(self.table, _COLUMNS) if not isinstance(row, Rejection))

    def _entry(
        self, where: str, row: Mapping[str, object], clips: Mapping[str, Path], rows: Mapping[str, int]
    ) -> Entry | Rejection:
        label, identifier, start, end = (str(row[column] or "").strip() for column in _COLUMNS)
        if not identifier:
            return Rejection("missing_media", where, "no youtube_id; complete or drop the row")
        if not label:
            return Rejection("missing_label", where, "no label; complete or drop the row (test lists come without)")
        span = _span(row)
        if span is None:
            detail = f"time_start {start!r} and time_end {end!r} are no span of seconds; mend the row"
            return Rejection("missing_media", where, detail)
        first, last = span
        names = (f"{identifier}_{first:06.0f}_{last:06.0f}", f"{identifier}_{first:g}_{last:g}", identifier)
        path = next((clips[name] for name in names if name in clips), None)
        if path is None:
            return Rejection("missing_media", where, f"no clip {' or '.join(names)} below {self.clips}")
        whole = path == clips.get(identifier) and (rows[identifier] > 1 or _length(path) > last - first + _TOLERANCE)
        return Entry(
            path=path,
            name=f"{names[0]}{path.suffix}",
            where=where,
            label=label,
            seconds=span if whole else None,
            split=self.split or str(row.get("split") or "").strip() or None,
            meta={"youtube_id": identifier, "time_start": first, "time_end": last},
        )


def _identifier(row: Mapping[str, object]) -> str:
    return str(row["youtube_id"] or "").strip()


def _span(row: Mapping[str, object]) -> tuple[float, float] | None:
    """Start and end of a row in seconds; None where they are none."""
    try:
        first, last = (float(str(row[column])) for column in ("time_start", "time_end"))
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
