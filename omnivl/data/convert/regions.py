"""X-VLM's files of regions: objects on lines, each a picture with its caption and the captions of its regions."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry, texts_of
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError


@dataclass(frozen=True)
class RegionsReader(FormReader):
    """X-VLM's regions: a picture with its captions and what is said of its regions, whose boxes are kept.

    Attributes:
        regions: Files of objects on lines, with image, caption and elems (caption, attributes, bb).
        images: Folder that the paths of pictures start from.

    Examples:
      omnivl data convert regions regions.jsonl genome --out shards
    """

    form = "regions"
    title = "X-VLM's regions"
    known = "image caption elems attributes bb image_id"

    regions: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The pictures in their order."""
        return (partial(self._entry, read, record) for record in read.objects(self.regions))

    def _entry(self, read: Reading, record: Record) -> Entry:
        image = record.text("image", "missing_media")
        captions = texts_of(record.get("caption"))
        if captions is None:
            record.wrong("caption", "a text or a list of texts")
        regions = []
        for region in read.inside(record, "elems"):
            try:
                regions += _regions(region)
            except BadSampleError as error:
                read.leave_out(error.rejection)
        if not regions:
            record.refuse("missing_caption", "no region has a caption")
        return Entry(
            path=self.images / image,
            name=image.lstrip("/"),
            where=record.where,
            captions=captions,
            identity=f"picture {image}",
            split=self.split,
            meta={"image_id": record.identifier("image_id")} if record.has("image_id") else {},
            boxes={"regions": ("xywh", regions)},
        )


def _regions(region: Record) -> list[dict[str, object]]:
    """What an object says of its box: each caption, and where it has attributes, each of them before the first one."""
    captions, attributes = texts_of(region.get("caption")), texts_of(region.get("attributes"))
    if not captions or attributes is None:
        region.wrong("caption" if not captions else "attributes", "a text or a list of texts", "missing_caption")
    box = region.numbers("bb", 4)
    named: list[dict[str, object]] = [
        {"attribute": f"{attribute} {captions[0]}", "box": box} for attribute in attributes
    ]
    return named or [{"caption": caption, "box": box} for caption in captions]
