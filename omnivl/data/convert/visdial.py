"""Visual Dialog: ten rounds of questions about a picture, each with a hundred possible answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, picture
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record

_PARTS = {
    "train": ("COCO_train2014", "COCO_val2014"),
    "val": ("VisualDialog_val2018",),
    "test": ("VisualDialog_test2018",),
}
"""The parts of COCO that the pictures of a split are of."""


@dataclass(frozen=True)
class VisDialReader(FormReader):
    """Visual Dialog 1.0: a sample for each round, with a copy of its picture.

    Attributes:
        dialogs: visdial_1.0_train.json, visdial_1.0_val.json, visdial_1.0_test.json.
        images: Folder of the pictures, or of the folders in which they are published.
        dense: visdial_1.0_val_dense_annotations.json or that of train: how fitting each answer of some rounds is. The
            field ``dense`` of these rounds is ``yes``, so that a plan can choose them.

    Examples:
      omnivl data convert visdial visdial_val.json visdial --dense visdial_val_dense.json --out shards
    """

    form = "visdial"
    title = "Visual Dialog"
    known = """split version data questions answers dialogs image_id caption dialog question answer answer_options
        gt_index round_id gt_relevance relevance"""

    dialogs: Path
    images: Path
    dense: Path | None = None

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The rounds in their order; of a dialog that breaks off, as the test's do, the last one alone.

        Raises:
            DataError: There are no questions, answers or dialogs.
        """
        top = read.top(self.dialogs)
        data = read.record(self.dialogs, ":data", found if isinstance(found := top.get("data"), dict) else {})
        questions, answers = read.needed(data, "questions"), read.needed(data, "answers")
        split, relevance = top.get("split"), self._relevance(read)
        for dialog in read.listed(data, "dialogs"):
            rounds = list(read.parts(dialog, "dialog"))
            for number in range(1, len(rounds) + 1):
                if rounds[-1].has("gt_index") or number == len(rounds):
                    yield partial(self._entry, dialog, rounds[:number], questions, answers, split, relevance)

    def _entry(
        self,
        dialog: Record,
        rounds: Sequence[Record],
        questions: Sequence[object],
        answers: Sequence[object],
        split: object,
        relevance: Mapping[tuple[str | int, ...], Record],
    ) -> Entry:
        image, number, asked = dialog.whole("image_id"), len(rounds), rounds[-1]
        question = _said(asked, "question", questions)
        options = asked.each("answer_options", partial(_text_of, answers), f"a number from 0 to {len(answers) - 1}")
        meta: dict[str, object] = {
            "image_id": image,
            "round_id": number,
            "image_caption": dialog.text("caption", "missing_caption"),
            "history": [[_said(one, "question", questions), _said(one, "answer", answers)] for one in rounds[:-1]],
            "question": question,
            "options": options,
        }
        if asked.has("gt_index"):
            meta["option"] = asked.whole("gt_index", len(options))
        if (found := relevance.get((image, number))) is not None:
            meta["relevance"] = found.numbers("relevance" if found.has("relevance") else "gt_relevance", len(options))
            meta["dense"] = "yes"
        part = split if isinstance(split, str) and split in _PARTS else None
        parts = [_PARTS[part]] if part is not None else _PARTS.values()
        return Entry(
            path=picture(self.images, *(path for names in parts for name in names for path in _paths(name, image))),
            name=f"{image}-{number}",
            where=asked.where,
            captions=(question,),
            identity=f"image {image}" if part == "train" else f"visdial {image}",
            split=self.split or part,
            meta=meta,
        )

    def _relevance(self, read: Reading) -> dict[tuple[str | int, ...], Record]:
        """The dense annotations by picture and round."""
        if self.dense is None:
            return {}
        return read.keyed(read.objects(self.dense), "image_id", "round_id")


def _said(record: Record, name: str, pool: Sequence[object]) -> str:
    """The text that a field points to in a pool."""
    text = _text_of(pool, record.get(name))
    if not text:
        record.wrong(name, f"the number of a text, from 0 to {len(pool) - 1}")
    return text


def _text_of(pool: Sequence[object], number: object) -> str | None:
    text = pool[number] if type(number) is int and 0 <= number < len(pool) else None
    return text.strip() if isinstance(text, str) else None


def _paths(part: str, image: int) -> tuple[str, ...]:
    """Where a picture may lie: beside the others, or in a folder of its part."""
    name = f"{part}_{image:012d}.jpg"
    return name, f"{part}/{name}", f"{part.removeprefix('COCO_')}/{name}"
