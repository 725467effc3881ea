"""Grounded captions: whether the objects that a caption names are where it puts them (F1_all, F1_loc).

Source: Zhou et al., arXiv 1812.06587, section 5.2 and appendix A.2; eval_grd_flickr30k_entities.py of
    github.com/facebookresearch/grounded-video-description.
Differs: lemmas are given, where the official program asks CoreNLP for them; an F1 whose precision and recall are both 0
    is 0, where it divides by zero; boxes of a single pixel are boxes, where it takes them for padding.

Precision and recall are means over **classes**, not over objects: each class counts once, however rare. The classes are
those of the references of pictures that have a caption. A box is right if its inclusive-pixel IoU is above (not at)
the threshold. A word that a caption names twice counts at its first box in recall and at each in precision; of several
objects of one class in a reference the first in the sentence is the one that precision compares with.

- all: a named object that the reference lacks counts against precision, unless the reference says the word without a
  box; an object of the reference that the caption does not name counts against recall.
- loc: only objects count that both name.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from omnivl.errors import DataError
from omnivl.tasks.scorers.boxes import iou

Box = Sequence[float]


@dataclass(frozen=True)
class GroundedReference:
    """One sentence of a picture.

    Attributes:
        classes: Class of each object, in the order of the sentence.
        boxes: Box of each, [left, top, right, bottom] in pixels.
        unboxed: Lemmas of the sentence's other words.
    """

    classes: tuple[str, ...]
    boxes: tuple[Box, ...]
    unboxed: AbstractSet[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class GroundedCaption:
    """The caption that was written for a picture.

    Attributes:
        classes: Class of each object that it names, in order.
        boxes: Box of each, in pixels.
    """

    classes: tuple[str, ...]
    boxes: tuple[Box, ...]


References = Mapping[str, Sequence[GroundedReference]]
Written = Mapping[str, GroundedCaption]
Hits = dict[str, list[bool]]
"""By class, whether each of its objects is right."""


def grounded_scores(
    references: References, written: Written, lemmas: Mapping[str, str] | None = None, threshold: float = 0.5
) -> dict[str, float]:
    """``precision``, ``recall`` and ``F1``, each as ``_all`` and ``_loc``.

    Args:
        references: The sentences of each picture, by its id.
        written: Its caption; pictures may lack one, which counts against recall alone.
        lemmas: Lemma of each class where it differs from the class's name.
        threshold: See the top of this file.

    Raises:
        DataError: No picture with a caption has an object in its references.
    """
    classes = {name for image, own in references.items() if image in written for one in own for name in one.classes}
    if not classes:
        raise DataError(
            "no picture with a caption has an object in its references, so that there is no F1 of grounding"
        )
    found: dict[str, float] = {}
    for mode in ("all", "loc"):
        precisions = _precisions(references, written, lemmas or {}, threshold, mode == "all")
        recalls = _recalls(references, written, threshold, mode == "all")
        precision, recall = _mean(precisions, len(classes)), _mean(recalls, len(classes))
        both = precision + recall
        found[f"precision_{mode}"], found[f"recall_{mode}"] = precision, recall
        found[f"F1_{mode}"] = 2 * precision * recall / both if both else 0.0
    return found


def placed(sentence: GroundedReference, caption: GroundedCaption, threshold: float = 0.5) -> list[tuple[str, bool]]:
    """Of each object of a caption that the sentence has a box of, its class and whether its box is right."""
    return [
        (name, _same(box, sentence.boxes[sentence.classes.index(name)], threshold))
        for name, box in zip(caption.classes, caption.boxes, strict=True)
        if name in sentence.classes
    ]


def _precisions(
    references: References, written: Written, lemmas: Mapping[str, str], threshold: float, invented: bool
) -> Hits:
    """Of each object of each caption, once for each reference, whether its box is right."""
    hits: Hits = defaultdict(list)
    for image, sentences in references.items():
        if image not in written:
            continue
        for sentence in sentences:
            for name, right in placed(sentence, written[image], threshold):
                hits[name].append(right)
            for name in written[image].classes if invented else ():
                if name not in sentence.classes and lemmas.get(name, name) not in sentence.unboxed:
                    hits[name].append(False)
    return hits


def _recalls(references: References, written: Written, threshold: float, missed: bool) -> Hits:
    """Of each object of each reference whether the caption has its box. Pictures without a caption always miss it."""
    hits: Hits = defaultdict(list)
    for image, sentences in references.items():
        caption = written.get(image)
        for sentence in sentences:
            for name, right in zip(sentence.classes, sentence.boxes, strict=True):
                if caption is None:
                    hits[name].append(False)
                elif name in caption.classes:
                    hits[name].append(_same(caption.boxes[caption.classes.index(name)], right, threshold))
                elif missed:
                    hits[name].append(False)
    return hits


def _same(box: Box, right: Box, threshold: float) -> bool:
    return bool(iou(box, right, inclusive=True) > threshold)


def _mean(hits: Hits, classes: int) -> float:
    """The sum of the classes' shares over the number of classes; classes of no reference have a share of 0."""
    return sum(sum(own) / len(own) for own in hits.values()) / classes
