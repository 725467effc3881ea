"""GQA: questions by number, in one file or several, with how they hang together."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, split_of
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.errors import DataError

_GROUPS = (("group", "local"), ("global_group", "global"))


@dataclass(frozen=True)
class GqaReader(FormReader):
    """GQA: a sample for each question, with a copy of its picture.

    Attributes:
        questions: train_balanced_questions.json and the like, or a folder of such files (train_all_questions).
        images: Folder of the pictures.

    Examples:
      omnivl data convert gqa gqa/val_balanced_questions.json gqa/images --out shards
    """

    form = "gqa"
    title = "GQA"
    known = """question imageId answer fullAnswer isBalanced types structural semantic detailed groups global
        local entailed equivalent annotations semanticStr"""

    questions: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The questions in their order.

        Raises:
            DataError: The folder has no file.
        """
        files = sorted(self.questions.glob("*.json")) if self.questions.is_dir() else [self.questions]
        if not files:
            raise DataError(f"{self.questions}: no .json file in this folder; give that of the questions")
        for file in files:
            split = self.split or split_of(file.stem)
            yield from (partial(self._entry, read, *found, split) for found in read.by_name(file))

    def _entry(self, read: Reading, number: str, record: Record, split: str | None) -> Entry:
        question, image = record.text("question", "missing_caption"), record.identifier("imageId")
        types, groups = read.within(record, "types"), read.within(record, "groups")
        meta: dict[str, object] = {"question": question, "question_id": number, "image_id": image}
        if record.has("answer") or types.fields:  # the test's questions have neither
            meta["answers"] = [record.text("answer")]
        meta |= {name: types.text(name) for name in ("structural", "semantic", "detailed") if types.has(name)}
        meta |= {name: groups.text(of) for name, of in _GROUPS if groups.has(of)}
        meta |= {name: record.texts(name) for name in ("entailed", "equivalent") if record.has(name)}
        if record.has("isBalanced"):
            meta["balanced"] = record.flag("isBalanced")
        return Entry(
            path=self.images / f"{image}.jpg",
            name=number,
            where=record.where,
            captions=(question,),
            identity=f"genome {image}",
            split=split,
            meta=meta,
        )
