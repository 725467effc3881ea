"""VQA v2: a file of questions about COCO's images, and one of what ten people answered to each."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import load_json
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError

_NUMBER = re.compile(r"\{image_id(?::0([0-9]{1,2})d?)?\}")
_TYPES = ("question_type", "answer_type", "multiple_choice_answer")


@dataclass(frozen=True)
class VqaReader:
    """Reads one split; its texts are held in memory, the pictures are not.

    Each question is a sample, with a copy of its picture. Its JSON has ``question``, ``question_id``, ``image_id``, and
    where there are annotations ``answers`` (as often as they were given), ``question_type``, ``answer_type`` and
    ``multiple_choice_answer``.

    Attributes:
        questions: ``v2_OpenEnded_mscoco_*_questions.json`` with ``questions`` (``image_id``, ``question``,
            ``question_id``).
        images: Folder of the pictures.
        annotations: ``v2_mscoco_*_annotations.json`` with ``annotations`` (``question_id``, ``answers`` ...); None for
            the tests, whose answers nobody has.
        picture: File name of a picture, with ``{image_id}``, or ``{image_id:012d}`` for one of 12 digits; None
            for COCO's, by the ``data_subtype`` of the questions.
        split: Split of all samples; None for none.
    """

    questions: Path
    images: Path
    annotations: Path | None = None
    picture: str | None = None
    split: str | None = None

    @property
    def form(self) -> str:
        """Name of the form."""
        return "vqa"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files."""
        return (self.questions,) if self.annotations is None else (self.questions, self.annotations)

    def count(self) -> int:
        """Number of questions."""
        return len(_listed(self.questions, "questions"))

    def entries(self) -> Iterator[Entry | Rejection]:
        """Questions in the file's order.

        Raises:
            DataError: A file lacks its list, or pictures cannot be named.
        """
        answered = {} if self.annotations is None else self._answered(self.annotations)
        pattern = self._pattern()
        for number, asked in enumerate(_listed(self.questions, "questions")):
            yield self._entry(asked, f"{self.questions}:questions[{number}]", answered, pattern)

    def _entry(
        self, asked: object, where: str, answered: Mapping[object, Mapping[str, object]], pattern: str
    ) -> Entry | Rejection:
        if not isinstance(asked, dict):
            return Rejection("wrong_json", where, f"is a {type(asked).__name__}; allowed: an object")
        question, numbers = asked.get("question"), {name: asked.get(name) for name in ("question_id", "image_id")}
        if not isinstance(question, str) or not question.strip():
            return Rejection("missing_caption", where, f"question is {question!r}; allowed: a text")
        for name, number in numbers.items():
            if not isinstance(number, int) or isinstance(number, bool):
                return Rejection("wrong_json", where, f"{name} is {number!r}; allowed: a whole number")
        meta: dict[str, object] = {"question": question.strip(), **numbers}
        if self.annotations is not None:
            found = answered.get(numbers["question_id"])
            if found is None:
                return Rejection("missing_field", where, f"question_id {numbers['question_id']} has no annotation")
            answers = _answers(found.get("answers"))
            if not answers:
                return Rejection("missing_field", where, f"question_id {numbers['question_id']} has no answers")
            meta |= {"answers": answers, **{name: found[name] for name in _TYPES if isinstance(found.get(name), str)}}
        return Entry(
            path=self.images / _NUMBER.sub(lambda place: str(numbers["image_id"]).zfill(int(place[1] or 0)), pattern),
            name=str(numbers["question_id"]),
            where=where,
            captions=(question.strip(),),
            identity=f"image {numbers['image_id']}",
            split=self.split,
            meta=meta,
        )

    def _answered(self, file: Path) -> dict[object, Mapping[str, object]]:
        """The annotations by the number of their question."""
        listed = [one for one in _listed(file, "annotations") if isinstance(one, dict)]
        return {one.get("question_id"): one for one in listed}

    def _pattern(self) -> str:
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
        read = load_json(self.questions)
        part = read.get("data_subtype") if isinstance(read, dict) else None
        if not isinstance(part, str):
            raise DataError(
                f"{self.questions}: no data_subtype, such as 'train2014', by which COCO's pictures are named; give the "
                "name of a picture, e.g. '{image_id}.jpg'"
            )
        if re.fullmatch(r"[A-Za-z0-9_-]+", part) is None:
            raise DataError(f"{self.questions}: data_subtype is {part!r}; allowed: a name such as 'train2014'; mend it")
        return f"COCO_{part.replace('test-dev', 'test')}_{{image_id:012d}}.jpg"


def _listed(file: Path, name: str) -> list[object]:
    """A list at the top of a file.

    Raises:
        DataError: There is none.
    """
    read = load_json(file)
    listed = read.get(name) if isinstance(read, dict) else None
    if not isinstance(listed, list):
        raise DataError(f"{file}: no list {name!r} at the top; allowed: a file of VQA v2; give another one")
    return listed


def _answers(listed: object) -> list[str]:
    """What people answered, without empty texts."""
    given = [one.get("answer") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [answer.strip() for answer in given if isinstance(answer, str) and answer.strip()]
