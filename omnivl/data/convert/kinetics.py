"""Kinetics: a CSV ``label,youtube_id,time_start,time_end,split`` and a folder of cut clips."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.convert.clips import find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import read_csv
from omnivl.data.sources.base import Rejection

_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True)
class KineticsReader:
    """Reads one CSV of Kinetics 400/600/700 (or any data set in its form).

    A clip is looked for as ``ID_000010_000020``, ``ID_10_20`` (start and end in seconds) or ``ID``, in any sub-folder.

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
        for row in read_csv(self.table, _COLUMNS):
            yield row if isinstance(row, Rejection) else self._entry(*row, clips)

    def _entry(self, where: str, row: Mapping[str, object], clips: Mapping[str, Path]) -> Entry | Rejection:
        label, identifier, start, end = (str(row[column] or "").strip() for column in _COLUMNS)
        if not identifier:
            return Rejection("missing_media", where, "no youtube_id; complete or drop the row")
        if not label:
            return Rejection("missing_label", where, "no label; complete or drop the row (test lists come without)")
        try:
            first, last = float(start), float(end)
        except ValueError:
            detail = f"time_start {start!r} and time_end {end!r} are no seconds; mend the row"
            return Rejection("missing_media", where, detail)
        names = (f"{identifier}_{first:06.0f}_{last:06.0f}", f"{identifier}_{first:g}_{last:g}", identifier)
        path = next((clips[name] for name in names if name in clips), None)
        if path is None:
            return Rejection("missing_media", where, f"no clip {' or '.join(names)} below {self.clips}")
        return Entry(
            path=path,
            name=f"{names[0]}{path.suffix}",
            where=where,
            label=label,
            split=self.split or str(row.get("split") or "").strip() or None,
            meta={"youtube_id": identifier, "time_start": first, "time_end": last},
        )
