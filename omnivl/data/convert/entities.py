"""Flickr30k Entities: sentences whose phrases are marked, and the boxes of what they name."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import ListedReader, MakeEntry
from omnivl.data.convert.lists import load_text
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError

_PHRASE = re.compile(r"\[/EN#([^/\]\s]+)/(\S+) ([^\]]*)\]")


@dataclass(frozen=True)
class EntitiesReader(ListedReader):
    """Flickr30k Entities: a sample for each sentence, with its phrases, their boxes and a copy of its picture.

    Attributes:
        folder: The folder with Annotations and Sentences.
        images: Folder of Flickr30k's pictures.
        each_phrase: Whether a sample is a phrase that has boxes, with the smallest box around them, and not a sentence
            with all of its phrases: what an objective of kind ``locate`` learns from. Phrases without boxes are left
            out and listed.

    Examples:
      omnivl data convert entities flickr30k_entities flickr30k-images --lists val.txt --out shards
    """

    form = "entities"
    title = "Flickr30k Entities"
    known = "annotation filename size width height depth object name bndbox xmin ymin xmax ymax scene nobndbox"

    folder: Path
    images: Path
    each_phrase: bool = False

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The sentences, or their phrases, in the order of the pictures' names.

        Raises:
            DataError: There is no file of sentences.
        """
        files = sorted((self.folder / "Sentences").glob("*.txt"))
        if not files:
            raise DataError(f"{self.folder}: no Sentences/*.txt; give the folder with Annotations and Sentences")
        splits = self.splits(read)
        for file in files:
            try:
                split = splits.of(file.stem, Record(file, "", {}))
                boxes = _boxes(read, self.folder / "Annotations" / f"{file.stem}.xml")
            except BadSampleError as error:
                read.leave_out(error.rejection)
                continue
            for number, line in enumerate(load_text(file).split("\n"), start=1):
                record = Record(file, f":{number}", {"line": line})
                if line.strip() and not self.each_phrase:
                    yield partial(self._sentence, record, str(number), split, boxes)
                elif line.strip():
                    yield from self._phrases(read, record, str(number), split, boxes)

    def _phrases(
        self, read: Reading, record: Record, name: str, split: str | None, boxes: Mapping[str, list[list[float]]]
    ) -> Iterator[MakeEntry]:
        try:
            _, phrases = _marked(record)
        except BadSampleError as error:
            read.leave_out(error.rejection)
            return
        for place, (identifier, phrase) in enumerate(phrases):
            yield partial(self._phrase, record, f"{name}-{place}", split, phrase, boxes.get(identifier, []))

    def _phrase(
        self, record: Record, name: str, split: str | None, phrase: str, boxes: Sequence[Sequence[float]]
    ) -> Entry:
        if not boxes:
            record.refuse("missing_field", f"{phrase[:60]!r} has no box")
        corners = list(zip(*boxes, strict=True))
        around = [min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])]
        return self._of_picture(record, name, split, phrase, {}, {"box": ("xyxy", around)})

    def _sentence(self, record: Record, name: str, split: str | None, boxes: Mapping[str, list[list[float]]]) -> Entry:
        sentence, found = _marked(record)
        meta = {"phrases": [phrase for _, phrase in found], "phrase_ids": [identifier for identifier, _ in found]}
        of_phrases = [boxes.get(identifier, []) for identifier, _ in found]
        return self._of_picture(record, name, split, sentence, meta, {"phrase_boxes": ("xyxy", of_phrases)})

    def _of_picture(
        self, record: Record, name: str, split: str | None, text: str, meta: Mapping[str, Any], boxes: Mapping[str, Any]
    ) -> Entry:
        """A sample of a picture and a text; ``name`` tells it from the picture's others."""
        image = record.file.stem
        return Entry(
            path=self.images / f"{image}.jpg",
            name=f"{image}-{name}",
            where=record.where,
            captions=(text,),
            identity=f"flickr30k {image}",
            split=split,
            meta={"image_id": image, **meta},
            boxes=boxes,
        )


def _marked(record: Record) -> tuple[str, list[tuple[str, str]]]:
    """A line's sentence without marks, and the number and the words of each of its phrases.

    Raises:
        BadSampleError: A mark is left.
    """
    line = record.text("line")
    sentence = _PHRASE.sub(r"\3", line)
    if re.search(r"\[/?EN#|\[/", sentence):
        record.refuse("wrong_field", f"a mark is left in {sentence[:60]!r}; allowed: [/EN#NUMBER/TYPE phrase]")
    return sentence, [(identifier, phrase.strip()) for identifier, _, phrase in _PHRASE.findall(line)]


def _boxes(read: Reading, file: Path) -> dict[str, list[list[float]]]:
    """Boxes in pixels by what they are of. The file counts pixels from 1, as its own tools know.

    Raises:
        BadSampleError: The file is missing, or no XML of this form.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if "<!ENTITY" in text:
            raise BadSampleError("wrong_field", str(file), "it defines entities; allowed: XML without; mend the file")
        root = ElementTree.fromstring(text)
    except FileNotFoundError as error:
        raise BadSampleError("missing_field", str(file), "the file does not exist; it has the boxes") from error
    except (ElementTree.ParseError, UnicodeDecodeError, OSError) as error:
        raise BadSampleError("wrong_field", str(file), f"no XML: {error}; mend the file") from error
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for element in root.iter():
        read.record(file, "", {element.tag: None})
    for number, thing in enumerate(root.iter("object")):
        box = thing.find("bndbox")
        if box is None:
            continue
        corners = {name: box.findtext(name) for name in ("xmin", "ymin", "xmax", "ymax")}
        record = Record(file, f":object[{number}].bndbox", corners)
        for name in thing.iter("name"):
            boxes[(name.text or "").strip()].append([record.number(corner) - 1 for corner in corners])
    return boxes
