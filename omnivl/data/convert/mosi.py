"""CMU-MOSI as MMSA publishes it: a CSV file with a row for each utterance, and a folder of clips for each video."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record


@dataclass(frozen=True)
class MosiReader(FormReader):
    """CMU-MOSI (and CMU-MOSEI) as MMSA publishes it: an utterance with its clip and how positive it is, from -3 to 3.

    Attributes:
        labels: label.csv.
        clips: The folder Raw, with the clips as VIDEO/CLIP.mp4.

    Examples:
      omnivl data convert mosi label.csv Raw --out shards
    """

    form = "mosi"
    title = "CMU-MOSI"
    known = "video_id clip_id text label label_T label_A label_V annotation mode"

    labels: Path
    clips: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The rows in their order.

        Raises:
            DataError: A column is missing.
        """
        rows = read.table(self.labels, ("video_id", "clip_id", "text", "label", "mode"))
        return (partial(self._entry, record) for record in rows)

    def _entry(self, record: Record) -> Entry:
        video, clip = record.text("video_id"), record.text("clip_id")
        return Entry(
            path=self.clips / video / f"{clip}.mp4",
            name=f"{video}/{clip}",
            where=record.where,
            captions=(record.text("text", "missing_caption"),),
            identity=f"mosi {video} {clip}",
            split=self.split or record.text("mode"),
            meta={"sentiment": record.number("label", -3, 3), "segment_id": f"{video}$_${clip}"},
        )
