"""VQA v2: a file of questions about COCO's images, and one of what ten people answered to each."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.errors import DataError

_NUMBER = re.compile(r"\{image_id(?::0([0-9]{1,2})d?)?\}")
_TYPES = ("question_type", "answer_type", "multiple_choice_answer")


@dataclass(frozen=True)
class VqaReader(FormReader):
    """VQA v2: a sample for each question, with a copy of its picture.

    Its JSON has the question, and where there are annotations the answers, as often as they were given.

    Attributes:
        questions: v2_OpenEnded_mscoco_*_questions.json.
        images: Folder of the pictures.
        annotations: v2_mscoco_*_annotations.json; without it, as for the tests, samples have no answers.
        picture: File name of a picture with {image_id}, or {image_id:012d} for 12 digits; without it as COCO
            names them, by the data_subtype of the questions.

    Examples:
      omnivl data convert vqa questions.json train2014 --annotations annotations.json --out shards
    """

    form = "vqa"
    title = "VQA v2"
    known = """info license data_type data_subtype task_type questions annotations image_id question question_id
        question_type answer_type multiple_choice_answer answers answer answer_confidence answer_id"""

    questions: Path
    images: Path
    annotations: Path | None = None
    picture: str | None = None

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """Questions in the file's order.

        Raises:
            DataError: A file lacks its list, or pictures cannot be named.
        """
        top = read.top(self.questions)
        asked = read.listed(top, "questions")
        answered = None
        if self.annotations is not None:
            found = read.listed(read.top(self.annotations), "annotations")
            answered = read.keyed(found, "question_id")
        pattern = self._pattern(top)
        return (partial(self._entry, read, record, answered, pattern) for record in asked)

    def _entry(
        self, read: Reading, record: Record, answered: Mapping[tuple[str | int, ...], Record] | None, pattern: str
    ) -> Entry:
        question = record.text("question", "missing_caption")
        number, image = record.whole("question_id"), record.whole("image_id")
        meta: dict[str, object] = {"question": question, "question_id": number, "image_id": image}
        if answered is not None:
            found = answered.get((number,))
            if found is None:
                record.refuse("missing_field", f"question_id {number} has no annotation")
            answers = [one.text("answer") for one in read.inside(found, "answers")]
            if not answers:
                record.refuse("missing_field", f"question_id {number} has no answers")
            meta |= {"answers": answers, **{name: found.text(name) for name in _TYPES if found.get(name)}}
        return Entry(
            path=self.images / _NUMBER.sub(lambda place: str(image).zfill(int(place[1] or 0)), pattern),
            name=str(number),
            where=record.where,
            captions=(question,),
            identity=f"image {image}",
            split=self.split,
            meta=meta,
        )

    def _pattern(self, top: Record) -> str:
        """File name of a picture, with ``{image_id}``.

        Raises:
            DataError: It is not given, and the questions do not say of which part of COCO they are.
        """
        if self.picture is not None:
            if _NUMBER.search(self.picture) is None:
                raise DataError(f"picture is {self.picture!r}; allowed: a file name with '{{image_id}}'; put it in")
            if re.search(r"[{}]", rest := _NUMBER.sub("", self.picture)):
                raise DataError(
                    f"picture is {self.picture!r}; allowed: '{{image_id}}', or '{{image_id:012d}}' for 12 digits, and "
                    f"no other braces, but {rest!r} is left; take them out"
                )
            return self.picture
        part = top.get("data_subtype")
        if not isinstance(part, str):
            raise DataError(
                f"{self.questions}: no data_subtype, such as 'train2014', by which COCO's pictures are named; give the "
                "name of a picture, e.g. '{image_id}.jpg'"
            )
        if re.fullmatch(r"[A-Za-z0-9_-]+", part) is None:
            raise DataError(f"{self.questions}: data_subtype is {part!r}; allowed: a name such as 'train2014'; mend it")
        return f"COCO_{part.replace('test-dev', 'test')}_{{image_id:012d}}.jpg"
