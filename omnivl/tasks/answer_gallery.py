"""Galleries of questions with the answers given to them."""

from collections.abc import Sequence

from omnivl.inference.pictures import PictureSet
from omnivl.tasks.results import Gallery, GalleryRow, evenly


def answer_gallery(
    name: str, pictures: PictureSet, asked: Sequence[str], answers: Sequence[str], right: Sequence[bool], most: int
) -> tuple[Gallery, ...]:
    """Some samples, evenly spread, with the answer given; no gallery for ``most`` 0.

    Args:
        name: Name of the task.
        pictures: The samples.
        asked: What stands above each picture.
        answers: The answer to each.
        right: Whether it is right.
        most: Number of rows.
    """
    places = evenly(len(pictures), most)
    rows = tuple(GalleryRow(asked[i], pictures.thumbnail(i), (answers[i],), ("",), (bool(right[i]),)) for i in places)
    return (Gallery(f"{name}: answers", rows),) if rows else ()
