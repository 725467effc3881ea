"""Something-Something v2: a JSON list of ids with labels, the labels' file and a folder of ``ID.webm`` clips."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.convert.clips import find_clips
from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import load_json
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError, did_you_mean

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SSv2Reader:
    """Reads ``something-something-v2-train.json`` or ``-validation.json``.

    The class is the template without brackets (``Holding something``), the caption what the uploader filled in
    (``holding potato``); an entry without a template has its label as class and no caption.

    Attributes:
        entries_file: List of ``{"id", "label", "template", "placeholders"}``.
        clips: Folder of the clips.
        labels: ``labels.json`` (class name to number); the classes of the list are checked against it. None checks
            nothing.
        split: Split of all samples; None for the one that the file's name says.
    """

    entries_file: Path
    clips: Path
    labels: Path | None = None
    split: str | None = None

    @property
    def form(self) -> str:
        """Name of the form."""
        return "ssv2"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The lists and the clips."""
        return tuple(path for path in (self.entries_file, self.labels, self.clips) if path is not None)

    def count(self) -> int:
        """Length of the list."""
        return len(self._rows())

    def entries(self) -> Iterator[Entry | Rejection]:
        """The list in its order.

        Raises:
            DataError: A file is not of this form, or there are no clips.
        """
        rows, classes, clips = self._rows(), self._classes(), find_clips(self.clips)
        for number, row in enumerate(rows):
            where = f"{self.entries_file}[{number}]"
            if not isinstance(row, dict):
                yield Rejection("wrong_json", where, f"is a {type(row).__name__}; allowed: an object")
            else:
                yield self._entry(where, row, classes, clips)

    def _entry(
        self, where: str, row: Mapping[str, object], classes: frozenset[str] | None, clips: Mapping[str, Path]
    ) -> Entry | Rejection:
        identifier = str(row.get("id", "")).strip()
        caption = str(row.get("label") or "").strip()
        label = str(row.get("template") or caption).replace("[", "").replace("]", "").strip()
        if not label:
            return Rejection("missing_label", where, "neither label nor template (the test list comes without)")
        if classes is not None and label not in classes:
            change = did_you_mean(label, classes, "name one of its classes")
            return Rejection("missing_label", where, f"class {label!r} is not in {self.labels}; {change}")
        if identifier not in clips:
            return Rejection("missing_media", where, f"no clip {identifier!r} below {self.clips}")
        path = clips[identifier]
        placeholders = row.get("placeholders")
        return Entry(
            path=path,
            name=f"{identifier}{path.suffix}",
            where=where,
            captions=(caption,) if caption and row.get("template") else (),
            label=label,
            split=self.split or next((split for split in _SPLITS if split in self.entries_file.stem), None),
            meta={"placeholders": placeholders} if placeholders else {},
        )

    def _rows(self) -> list[object]:
        rows = load_json(self.entries_file)
        if not isinstance(rows, list):
            kind = type(rows).__name__
            raise DataError(f"{self.entries_file}: holds a {kind}; allowed: a list of objects with 'id' and 'label'")
        return rows

    def _classes(self) -> frozenset[str] | None:
        if self.labels is None:
            return None
        classes = load_json(self.labels)
        if not isinstance(classes, dict | list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{self.labels}: allowed: an object of class names and numbers, or a list of class names")
        return frozenset(classes)
