"""Visual Genome: what is said of regions of a picture, and questions about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry, picture
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError


@dataclass(frozen=True)
class GenomeRegionsReader(FormReader):
    """Visual Genome's regions: the captions of a picture are what is said of its regions, whose boxes are kept.

    Attributes:
        regions: region_descriptions.json.
        images: Folder of VG_100K and VG_100K_2, or of the pictures of both.

    Examples:
      omnivl data convert genome-regions region_descriptions.json genome --out shards
    """

    form = "genome-regions"
    title = "Visual Genome's regions"
    known = "id image_id regions region_id width height phrase x y synsets"

    regions: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The pictures in their order, each with all its regions."""
        return (partial(self._entry, read, record) for record in read.objects(self.regions))

    def _entry(self, read: Reading, record: Record) -> Entry:
        regions: list[dict[str, object]] = []
        for region in read.inside(record, "regions"):
            try:
                box = [region.number(name) for name in ("x", "y", "width", "height")]
                regions.append({"caption": region.text("phrase", "missing_caption"), "box": box})
            except BadSampleError as error:
                read.leave_out(error.rejection)
        if not regions:
            record.refuse("missing_caption", "no region has a phrase")
        image = record.whole("id")
        return Entry(
            path=genome_picture(self.images, image),
            name=str(image),
            where=record.where,
            captions=tuple(dict.fromkeys(str(region["caption"]) for region in regions)),
            identity=f"genome {image}",
            split=self.split,
            meta={"image_id": image},
            boxes={"regions": ("xywh", regions)},
        )


@dataclass(frozen=True)
class GenomeQuestionsReader(FormReader):
    """Visual Genome's questions: a sample for each question, with a copy of its picture.

    Attributes:
        questions: question_answers.json.
        images: Folder of VG_100K and VG_100K_2, or of the pictures of both.

    Examples:
      omnivl data convert genome-questions question_answers.json genome --out shards
    """

    form = "genome-questions"
    title = "Visual Genome's questions"
    known = "id qas qa_id image_id question answer a_objects q_objects"

    questions: Path
    images: Path

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The questions in their order."""
        for record in read.objects(self.questions):
            yield from (partial(self._entry, one, record) for one in read.parts(record, "qas"))

    def _entry(self, record: Record, of: Record) -> Entry:
        question, number, image = record.text("question", "missing_caption"), record.whole("qa_id"), of.whole("id")
        return Entry(
            path=genome_picture(self.images, image),
            name=str(number),
            where=record.where,
            captions=(question,),
            identity=f"genome {image}",
            split=self.split,
            meta={"question": question, "question_id": number, "image_id": image, "answers": [record.text("answer")]},
        )


def genome_picture(images: Path, number: int) -> Path:
    """A picture of Visual Genome, in one of the two folders in which they are published, or beside the others."""
    return picture(images, *(f"{folder}/{number}.jpg" for folder in ("VG_100K", "VG_100K_2", ".")))
