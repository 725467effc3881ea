"""SNLI-VE: objects on lines, each a hypothesis about a picture of Flickr30k and whether it follows from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, split_of
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record

LABELS = ("contradiction", "neutral", "entailment")


@dataclass(frozen=True)
class SnliVeReader(FormReader):
    """SNLI-VE: a hypothesis about a picture of Flickr30k, with a copy of the picture.

    Attributes:
        hypotheses: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl.
        images: Folder of Flickr30k's pictures.

    Examples:
      omnivl data convert snli-ve snli_ve_dev.jsonl flickr30k-images --out shards
    """

    form = "snli-ve"
    title = "SNLI-VE"
    known = """Flickr30K_ID annotator_labels captionID gold_label pairID sentence1 sentence1_binary_parse
        sentence1_parse sentence2 sentence2_binary_parse sentence2_parse"""

    hypotheses: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The hypotheses in their order; those that people did not agree on, whose label is ``-``, are left out."""
        return (partial(self._entry, record) for record in read.objects(self.hypotheses))

    def _entry(self, record: Record) -> Entry:
        image, pair = record.identifier("Flickr30K_ID"), record.text("pairID")
        return Entry(
            path=self.images / f"{image}.jpg",
            name=pair,
            where=record.where,
            captions=(record.text("sentence2", "missing_caption"),),
            identity=f"flickr30k {image}",
            split=self.split or split_of(self.hypotheses.stem),
            meta={
                "answer": record.one_of("gold_label", LABELS, "missing_label"),
                "pair_id": pair,
                **({"premise": record.text("sentence1")} if record.has("sentence1") else {}),
            },
        )
