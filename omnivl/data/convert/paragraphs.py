"""Stanford's image paragraphs: a list of paragraphs about pictures of Visual Genome."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import ListedReader, MakeEntry, SplitLists
from omnivl.data.convert.genome import genome_picture
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record


@dataclass(frozen=True)
class ParagraphsReader(ListedReader):
    """Stanford's image paragraphs: a picture of Visual Genome with a paragraph about it.

    Attributes:
        paragraphs: paragraphs_v1.json.
        images: Folder of VG_100K and VG_100K_2, or of the pictures of both.

    Examples:
      omnivl data convert paragraphs paragraphs_v1.json genome --lists val_split.json --out shards
    """

    form = "paragraphs"
    title = "Stanford's paragraphs"
    known = "image_id paragraph url"

    paragraphs: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The paragraphs in their order.

        Raises:
            DataError: The file has a form that nobody knows, or a list cannot be read.
        """
        splits = self.splits(read)
        return (partial(self._entry, record, splits) for record in read.objects(self.paragraphs))

    def _entry(self, record: Record, splits: SplitLists) -> Entry:
        record.only(self.known.split(), self.title)
        image = record.whole("image_id")
        return Entry(
            path=genome_picture(self.images, image),
            name=str(image),
            where=record.where,
            captions=(" ".join(record.text("paragraph", "missing_caption").split()),),
            identity=f"genome {image}",
            split=splits.of(image, record),
            meta={"image_id": image},
        )
