"""VCR: questions, answers and reasons whose words may be objects of the picture, with the objects' boxes beside it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, exists
from omnivl.data.convert.lists import load_json
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record

NAMES = (
    *("Casey", "Riley", "Jessie", "Jackie", "Avery", "Jaime", "Peyton", "Kerry"),
    *("Jody", "Kendall", "Skyler", "Frankie", "Pat", "Quinn", "Robin"),
)
"""Names that men and women have, given to the persons of a picture in their order."""

_METADATA = ("boxes", "segms", "names", "width", "height")


@dataclass(frozen=True)
class VcrReader(FormReader):
    """VCR: a question about a scene of a film, four answers, and four reasons for the right one.

    Words that are objects of the picture become what the object is, persons the name of one that men and women have.
    The text of the right answer is the field answer, which a model that chooses among reasons can read.

    Attributes:
        questions: train.jsonl, val.jsonl, test.jsonl.
        images: The folder vcr1images, with the .json beside each picture.

    Examples:
      omnivl data convert vcr val.jsonl vcr1images --out shards
    """

    form = "vcr"
    title = "VCR"
    known = """movie objects interesting_scores answer_likelihood img_fn metadata_fn answer_orig question_orig
        rationale_orig question answer_match_iter answer_sources answer_choices answer_label rationale_choices
        rationale_sources rationale_match_iter rationale_label img_id question_number annot_id match_fold match_index
        boxes segms names width height"""

    questions: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The questions in their order, each with a copy of its picture.

        Raises:
            DataError: The file beside a picture has a form that nobody knows.
        """
        return (partial(self._entry, read, record) for record in read.objects(self.questions))

    def _entry(self, read: Reading, record: Record) -> Entry:
        number, objects = record.text("annot_id"), record.texts("objects")
        names = [
            one if one != "person" else NAMES[objects[:place].count("person") % len(NAMES)]
            for place, one in enumerate(objects)
        ]
        question = _joined(record.get("question"), names)
        if question is None:
            record.wrong("question", _ALLOWED, "missing_caption")
        meta: dict[str, object] = {"annot_id": number, "question": question, "objects": objects}
        for choices, label, texts, index in _QUESTIONS:
            meta[texts] = record.each(choices, lambda words: _joined(words, names), _ALLOWED, 4)
            meta |= {index: record.whole(label, 4)} if record.has(label) else {}
        options, right = meta["options"], meta.get("option")
        if isinstance(options, list) and isinstance(right, int):
            meta["answer"] = options[right]
        return Entry(
            path=self.images / record.text("img_fn"),
            name=number,
            where=record.where,
            captions=(question,),
            identity=f"vcr {record.text('img_fn')}",
            split=self.split or number.partition("-")[0],
            meta=meta,
            boxes={"boxes": ("xyxy", self._boxes(record, len(objects)))},
        )

    def _boxes(self, record: Record, count: int) -> list[list[float]]:
        """Boxes in pixels, of whose five numbers the last one is how sure the detector was."""
        file = self.images / record.text("metadata_fn")
        if not exists(file):
            record.refuse("missing_media", f"{file} does not exist; it has the boxes")
        found = load_json(file)
        if not isinstance(found, dict):
            record.refuse("wrong_json", f"{file} holds a {type(found).__name__}; allowed: an object")
        metadata = Record(record.file, f"{record.place}: {record.text('metadata_fn')}", found)
        metadata.only(_METADATA, self.title)
        rows = metadata.values("boxes", count)
        named = (Record(record.file, metadata.place, {f"boxes[{place}]": one}) for place, one in enumerate(rows))
        return [one.numbers(name, 5)[:4] for one in named for name in one.fields]


_ALLOWED = "words, and lists of numbers of objects"
_QUESTIONS = (
    ("answer_choices", "answer_label", "options", "option"),
    ("rationale_choices", "rationale_label", "rationales", "rationale"),
)


def _joined(words: object, names: list[str]) -> str | None:
    """A text of words and numbers of objects; None where it is none. Several objects of one place are joined by and."""
    if not isinstance(words, list):
        return None
    texts: list[str] = []
    for word in words:
        if isinstance(word, str):
            texts.append(word)
        elif isinstance(word, list) and word and all(type(one) is int and 0 <= one < len(names) for one in word):
            texts.append(" and ".join(names[one] for one in word))
        else:
            return None
    return " ".join(texts).strip()
