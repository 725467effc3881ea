"""NLVR2: objects on lines, each a sentence about two pictures and whether it is true."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, picture
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record


@dataclass(frozen=True)
class Nlvr2Reader(FormReader):
    """NLVR2: a sentence about two pictures.

    Attributes:
        sentences: train.json, dev.json, test1.json.
        images: Folder of the pictures: all in one, or in the sub-folders in which they are published.

    Examples:
      omnivl data convert nlvr2 nlvr2/train.json nlvr2/images --out shards
    """

    form = "nlvr2"
    title = "NLVR2"
    known = """identifier sentence label directory left_url right_url query synset validation writer
        extra_validations worker_id"""

    sentences: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The sentences in their order, each with ``left``, ``right`` and ``answer``."""
        return (partial(self._entry, record) for record in read.objects(self.sentences))

    def _entry(self, record: Record) -> Entry:
        identifier, sentence = record.text("identifier"), record.text("sentence", "missing_caption")
        parts = identifier.split("-")
        if len(parts) != 4:
            record.wrong("identifier", "SPLIT-SET-PAIR-SENTENCE")
        pair, directory = "-".join(parts[:3]), str(record.get("directory") or "")
        label = record.one_of("label", ("True", "False"), "missing_label") if record.has("label") else None
        names = {side: f"{pair}-img{number}.png" for number, side in enumerate(("left", "right"))}
        return Entry(
            path=None,
            name=identifier,
            where=record.where,
            captions=(sentence,),
            identity=f"nlvr2 {pair}",
            split=self.split or parts[0],
            meta={"identifier": identifier} | ({} if label is None else {"answer": label.lower()}),
            pictures={
                side: picture(
                    self.images,
                    *(f"{folder}/{name}" for folder in (".", directory, parts[0], f"{parts[0]}/{directory}") if folder),
                )
                for side, name in names.items()
            },
        )
