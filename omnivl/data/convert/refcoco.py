"""RefCOCO, RefCOCO+ and RefCOCOg: expressions for one object of a picture, with its box and its mask."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.masks import mask_png
from omnivl.data.convert.pickles import load_pickle
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.errors import DataError


@dataclass(frozen=True)
class RefCocoReader(FormReader):
    """RefCOCO, RefCOCO+ or RefCOCOg: a sample for each object that is referred to, with a copy of its picture.

    Attributes:
        refs: refs(unc).p, for RefCOCOg refs(umd).p. It is a pickle: only plain values are read, nothing in it is run.
        instances: The instances.json beside it, with the boxes and masks of all objects.
        images: COCO's folder train2014.
        each_expression: Whether a sample is an expression, as published figures count them, and not an object with all
            of its expressions.

    Examples:
      omnivl data convert refcoco "refcoco/refs(unc).p" refcoco/instances.json train2014 --each-expression --out shards
    """

    form = "refcoco"
    title = "RefCOCO"
    known = """ref_id ann_id image_id category_id file_name split sent_ids sentences sent raw sent_id tokens
        images annotations categories info licenses id height width license date_captured flickr_url coco_url bbox
        area segmentation iscrowd supercategory name"""

    refs: Path
    instances: Path
    images: Path
    each_expression: bool = False

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """The objects, or their expressions, in the order of the pickle.

        Raises:
            DataError: The pickle holds no list, or anything that would have to be run.
        """
        top = read.top(self.instances)
        pictures = read.keyed(read.listed(top, "images"), "id")
        objects = read.keyed(read.listed(top, "annotations"), "image_id", "id")
        together: dict[object, list[Record]] = defaultdict(list)
        for (image, _), one in objects.items():
            together[image].append(one)
        refs = load_pickle(self.refs)
        if not isinstance(refs, list):
            raise DataError(f"{self.refs}: holds a {type(refs).__name__}; allowed: the list of a refs(...).p")
        for record in read.records(self.refs, refs):
            said = record.get("sentences")
            several = len(said) if self.each_expression and isinstance(said, list) and said else 0
            for place in range(several) if several else (None,):
                yield partial(self._entry, read, record, pictures, objects, together, place)

    def _entry(
        self,
        read: Reading,
        record: Record,
        pictures: Mapping[tuple[str | int, ...], Record],
        objects: Mapping[tuple[str | int, ...], Record],
        together: Mapping[object, Sequence[Record]],
        place: int | None,
    ) -> Entry:
        number, image = record.whole("ref_id"), record.whole("image_id")
        shown, thing = pictures.get((image,)), objects.get((image, record.whole("ann_id")))
        if shown is None or thing is None:
            absent = f"ann_id {record.get('ann_id')}" if thing is None else f"image_id {image}"
            record.refuse("missing_field", f"{absent} is not in {self.instances.name}; give the one beside the pickle")
        sentences = [one.text("sent", "missing_caption") for one in read.inside(record, "sentences")]
        if not sentences:
            record.refuse("missing_caption", "no sentence")
        every = [(one, one.numbers("bbox", 4)) for one in together[image]]
        shown_things = [(one, box) for one, box in every if one is thing or (box[2] > 0 and box[3] > 0)]
        return Entry(
            path=self.images / shown.text("file_name"),
            name=str(number) if place is None else f"{number}-{place}",
            where=record.where,
            captions=tuple(dict.fromkeys(sentences)) if place is None else (sentences[place],),
            identity=f"image {image}",
            split=self.split or record.text("split"),
            meta={"ref_id": number, "image_id": image, "target": [one is thing for one, _ in shown_things].index(True)},
            masks={"mask": mask_png(thing, "segmentation", (shown.whole("width"), shown.whole("height")))},
            boxes={"box": ("xywh", thing.numbers("bbox", 4)), "candidates": ("xywh", [box for _, box in shown_things])},
        )
