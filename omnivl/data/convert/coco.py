"""COCO captions: ``{"images": [...], "annotations": [...]}``, or the same with sentences inside (Karpathy's splits)."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.form import FormReader, MakeEntry
from omnivl.data.convert.reading import Reading
from omnivl.data.convert.records import Record
from omnivl.data.sources.base import BadSampleError, Rejection
from omnivl.errors import DataError


@dataclass(frozen=True)
class CocoReader(FormReader):
    """COCO captions, Karpathy's splits of COCO and Flickr30k, NoCaps: a picture with all its captions.

    The texts are held in memory, the pictures are not.

    Attributes:
        annotations: captions_*.json, nocaps_val_4500_captions.json, or Karpathy's dataset_*.json.
        images: Folder of the pictures (or clips, of data sets in this form).
        restval_as_train: Karpathy's restval, 30,504 pictures of COCO that all papers train on, becomes train.

    Examples:
      omnivl data convert coco annotations/captions_train2017.json train2017 --out shards
      omnivl data convert coco dataset_coco.json coco --restval-as-train --out shards
      omnivl data convert coco nocaps_val_4500_captions.json nocaps --split-name val --out shards
    """

    form = "coco"
    title = "COCO captions"
    known = """images annotations info licenses license type dataset id file_name filename filepath height width
        date_captured flickr_url coco_url open_images_id domain image_id caption imgid cocoid split sentids sentid
        sentences raw tokens name url version description year contributor date_created"""

    annotations: Path
    images: Path
    restval_as_train: bool = False

    def samples(self, read: Reading) -> Iterator[MakeEntry]:
        """Images in the file's order, each with all its captions; then the annotations that belong to none.

        Raises:
            DataError: The file has no ``images``, or no captions in either form.
        """
        top = read.top(self.annotations)
        images = list(read.listed(top, "images"))
        found = top.get("annotations")
        annotations = found if isinstance(found, list) else []
        if not any(one.has("sentences") for one in images) and not any(
            isinstance(one, dict) and "caption" in one for one in annotations
        ):
            raise DataError(
                f"{self.annotations}: no annotation has a 'caption' (is it an instances_*.json?); give captions_*.json"
            )
        captions: dict[object, list[str]] = defaultdict(list)
        places: dict[object, str] = {}
        for one in read.listed(top, "annotations") if annotations else ():
            try:
                number, caption = one.identifier("image_id"), one.text("caption", "missing_caption")
            except BadSampleError as error:
                read.leave_out(error.rejection)
                continue
            captions[number].append(caption)
            places.setdefault(number, one.where)
        data_set = str(top.get("dataset") or "picture")
        for image in images:
            known = image.get("id") if image.has("id") else image.get("imgid")
            own = captions.pop(known, []) if isinstance(known, int | str) else []
            yield partial(self._entry, read, image, own, data_set)
        for image_id, orphans in captions.items():
            detail = f"image_id {image_id!r} with {len(orphans)} caption(s) is not among the images, or is there twice"
            read.leave_out(Rejection("missing_media", places[image_id], detail))

    def _entry(self, read: Reading, image: Record, captions: list[str], data_set: str) -> Entry:
        name = image.text("file_name" if image.has("file_name") else "filename")
        if image.has("filepath"):
            name = f"{image.text('filepath')}/{name}"
        if image.has("sentences"):
            captions = captions + [one.text("raw", "missing_caption") for one in read.inside(image, "sentences")]
        if not captions:
            image.refuse("missing_caption", f"no annotation has a caption for {name}")
        split = image.text("split") if image.has("split") else None
        known = next((one for one in ("id", "cocoid", "imgid") if image.has(one)), None)
        number = None if known is None else image.identifier(known)
        return Entry(
            path=self.images / name,
            name=Path(name).as_posix(),
            where=image.where,
            captions=tuple(captions),
            identity=_identity(image, known, f"{data_set} {Path(name).stem}"),
            split=self.split or ("train" if split == "restval" and self.restval_as_train else split),
            meta={
                **({} if number is None else {"image_id": number}),
                **({"domain": image.text("domain")} if image.has("domain") else {}),
            },
        )


def _identity(image: Record, known: str | None, named: str) -> str:
    """Whose picture it is: COCO's by number, as in its other data sets, others by what they are called."""
    if image.has("open_images_id"):
        return f"open images {image.identifier('open_images_id')}"
    return named if known in (None, "imgid") else f"image {image.identifier(str(known))}"
