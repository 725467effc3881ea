"""COCO captions: ``{"images": [...], "annotations": [...]}``, or the same with sentences inside (Karpathy's splits)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.convert.entry import Entry
from omnivl.data.convert.lists import load_json
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError


@dataclass(frozen=True)
class CocoReader:
    """Reads one annotation file; its texts are held in memory, the pictures are not.

    Attributes:
        annotations: ``captions_*.json`` with ``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``,
            ``caption``); or Karpathy's form, whose images carry ``sentences`` (``raw``), ``filepath``, ``filename``
            and ``split``.
        images: Folder of the pictures (or clips: MSR-VTT and others use this form too).
        split: Split of all samples; None for the one in the file, if any.
    """

    annotations: Path
    images: Path
    split: str | None = None

    @property
    def form(self) -> str:
        """Name of the form."""
        return "coco"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The annotation file."""
        return (self.annotations,)

    def count(self) -> int:
        """Number of images in the file."""
        return len(self._load()[0])

    def entries(self) -> Iterator[Entry | Rejection]:
        """Images in the file's order, each with all its captions; then the annotations that belong to none.

        Raises:
            DataError: The file has no ``images``, or no captions in either form.
        """
        images, annotations = self._load()
        captions: dict[object, list[str]] = defaultdict(list)
        numbers: dict[object, int] = {}
        for number, annotation in enumerate(annotations):
            found = self._annotation(annotation, number)
            if isinstance(found, Rejection):
                yield found
            else:
                captions[found[0]].append(found[1])
                numbers.setdefault(found[0], number)
        for number, image in enumerate(images):
            where = f"{self.annotations}:images[{number}]"
            if not isinstance(image, dict):
                yield Rejection("wrong_json", where, f"is a {type(image).__name__}; allowed: an object")
                continue
            number_of = image.get("id", image.get("imgid"))
            own = captions.pop(number_of, []) if isinstance(number_of, int | str) else []
            yield self._entry(image, own + _sentences(image), where)
        for image_id, orphans in captions.items():
            where = f"{self.annotations}:annotations[{numbers[image_id]}]"
            detail = f"image_id {image_id!r} with {len(orphans)} caption(s) is not among the images, or is there twice"
            yield Rejection("missing_media", where, detail)

    def _annotation(self, annotation: object, number: int) -> tuple[int | str, str] | Rejection:
        where = f"{self.annotations}:annotations[{number}]"
        if not isinstance(annotation, dict):
            return Rejection("wrong_json", where, f"is a {type(annotation).__name__}; allowed: an object")
        image_id, caption = annotation.get("image_id"), annotation.get("caption")
        if not isinstance(image_id, int | str):
            return Rejection("wrong_json", where, f"image_id is {image_id!r}; allowed: a number or a text")
        if not isinstance(caption, str) or not caption.strip():
            return Rejection("missing_caption", where, f"caption is {caption!r}; allowed: a text")
        return image_id, caption.strip()

    def _entry(self, image: Mapping[str, object], captions: list[str], where: str) -> Entry | Rejection:
        name = image.get("file_name", image.get("filename"))
        if not isinstance(name, str) or not name:
            return Rejection("wrong_json", where, "no file_name; allowed: the picture's path below the images' folder")
        folder = image.get("filepath")
        if isinstance(folder, str) and folder:
            name = f"{folder}/{name}"
        if not captions:
            return Rejection("missing_caption", where, f"no annotation has a caption for {name}")
        split = self.split or image.get("split")
        number = image.get("id", image.get("cocoid", image.get("imgid")))
        meta = {} if number is None else {"image_id": number}
        return Entry(
            path=self.images / name,
            name=Path(name).as_posix(),
            where=where,
            captions=tuple(captions),
            split=split if isinstance(split, str) else None,
            meta=meta,
        )

    def _load(self) -> tuple[list[object], list[object]]:
        found = load_json(self.annotations)
        images = found.get("images") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(images, list):
            raise DataError(f"{self.annotations}: no list 'images' at the top; allowed: a COCO captions file")
        annotations = found.get("annotations", [])
        has_sentences = any(isinstance(image, dict) and "sentences" in image for image in images)
        has_captions = isinstance(annotations, list) and any(
            isinstance(annotation, dict) and "caption" in annotation for annotation in annotations
        )
        if not has_sentences and not has_captions:
            raise DataError(
                f"{self.annotations}: no annotation has a 'caption' (is it an instances_*.json?); give captions_*.json"
            )
        return images, annotations


def _sentences(image: Mapping[str, object]) -> list[str]:
    """Captions in Karpathy's form."""
    sentences = image.get("sentences")
    if not isinstance(sentences, list):
        return []
    texts = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]
