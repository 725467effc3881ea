"""Something-Something v2: a JSON list of ids with labels, the labels' file and a folder of ``ID.webm`` clips."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.clips import clip_of, find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, split_of
from omnivl.data.convert.lists import load_json
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.errors import DataError, did_you_mean


@dataclass(frozen=True)
class SSv2Reader(FormReader):
    """Something-Something v2: a clip with its class and what the uploader said of it.

    The class is the template without brackets (Holding something), the caption what was filled in (holding potato); an
    entry without a template has its label as class and no caption.

    Attributes:
        entries_file: something-something-v2-train.json or -validation.json.
        clips: Folder of the .webm clips.
        labels: labels.json, to check the classes against.

    Examples:
      omnivl data convert ssv2 train.json clips --out shards --labels labels.json
    """

    form = "ssv2"
    title = "Something-Something v2"
    known = "id label template placeholders"

    entries_file: Path
    clips: Path
    labels: Path | None = None

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The list in its order.

        Raises:
            DataError: A file is not of this form, or there are no clips.
        """
        rows, classes, clips = read.objects(self.entries_file), self._classes(), find_clips(self.clips)
        return (partial(self._entry, record, classes, clips) for record in rows)

    def _entry(self, record: Record, classes: frozenset[str] | None, clips: Mapping[str, Path]) -> Entry:
        identifier = str(record.get("id") or "").strip()
        caption = str(record.get("label") or "").strip()
        label = str(record.get("template") or caption).replace("[", "").replace("]", "").strip()
        if not label:
            record.refuse("missing_label", "neither label nor template (the test list comes without)")
        if classes is not None and label not in classes:
            change = did_you_mean(label, classes, "name one of its classes")
            record.refuse("missing_label", f"class {label!r} is not in {self.labels}; {change}")
        path = clip_of(clips, record, identifier)
        placeholders = record.get("placeholders")
        return Entry(
            path=path,
            name=f"{identifier}{path.suffix}",
            where=record.where,
            captions=(caption,) if caption and record.get("template") else (),
            label=label,
            split=self.split or split_of(self.entries_file.stem),
            meta={"placeholders": placeholders} if placeholders else {},
        )

    def _classes(self) -> frozenset[str] | None:
        if self.labels is None:
            return None
        classes = load_json(self.labels)
        if not isinstance(classes, dict | list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{self.labels}: allowed: an object of class names and numbers, or a list of class names")
        return frozenset(classes)
