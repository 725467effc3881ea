"""Fields of samples that tasks read, each checked."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError

Phrase = tuple[str, list[list[float]]]
"""A text, and the boxes of what it names: left, top, right, bottom as fractions."""


def picture_of(sample: Sample) -> str:
    """What the samples of one picture share: its identity, or of a sample without one its key."""
    return str(sample.identity or sample.key)


def text_of(sample: Sample, name: str) -> str:
    """A text.

    Raises:
        DataError: It is not there, or no text.
    """
    return _of_type(sample, name, str, "a text")  # type: ignore[no-any-return]


def number_of(sample: Sample, name: str) -> float:
    """A number.

    Raises:
        DataError: It is not there, or no number.
    """
    return float(_of_type(sample, name, (int, float), "a number"))


def texts_of(sample: Sample, name: str, least: int = 1) -> list[str]:
    """A list of texts, at least so many.

    Raises:
        DataError: It is not there, or no such list.
    """
    found = _of_type(sample, name, list, "a list of texts")
    if len(found) < least or not all(isinstance(one, str) for one in found):
        raise _lacking(sample, name, found, "a list of texts")
    return list(found)


def place_of(sample: Sample, name: str, choices: Sequence[object]) -> int:
    """An index into a list.

    Raises:
        DataError: It is not there, or beyond the list.
    """
    found = number_of(sample, name)
    if found != int(found) or not 0 <= found < len(choices):
        raise _lacking(sample, name, found, f"an index from 0 to {len(choices) - 1}")
    return int(found)


def box_of(sample: Sample, name: str) -> list[float]:
    """A box, [left, top, right, bottom] as fractions.

    Raises:
        DataError: It is not there, or no box.
    """
    found = _of_type(sample, name, list, "a box")
    if not _is_box(found):
        raise _lacking(sample, name, found, "a box [left, top, right, bottom]")
    return [float(one) for one in found]


def phrases_of(sample: Sample, name: str, boxes: str) -> list[Phrase]:
    """Phrases, maybe none, each with its boxes, maybe none.

    Args:
        sample: The sample.
        name: Field with the list of phrases.
        boxes: Field with a list of boxes for each phrase.

    Raises:
        DataError: They are not there, or no such lists.
    """
    phrases = _of_type(sample, name, list, "a list of texts")
    if not all(isinstance(one, str) for one in phrases):
        raise _lacking(sample, name, phrases, "a list of texts")
    found = _of_type(sample, boxes, list, "a list of boxes for each phrase")
    if len(found) != len(phrases) or not all(isinstance(own, list) and all(map(_is_box, own)) for own in found):
        raise _lacking(sample, boxes, found, f"a list of boxes for each of {len(phrases)} phrases")
    return list(zip(phrases, found, strict=True))


def places_by(samples: Sequence[Sample], name: str) -> dict[str, list[int]]:
    """Which samples have each value of a field, values in alphabetical order; ``other`` where a sample has none."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        found[str(sample.meta.get(name, "other"))].append(place)
    return dict(sorted(found.items()))


def _is_box(found: object) -> bool:
    return isinstance(found, list) and len(found) == 4 and all(isinstance(one, int | float) for one in found)


def _of_type(sample: Sample, name: str, kind: type | tuple[type, ...], allowed: str) -> Any:
    found = sample.meta.get(name)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise _lacking(sample, name, found, allowed)
    return found


def _lacking(sample: Sample, name: str, found: object, allowed: str) -> DataError:
    shown = "nothing" if found is None else repr(found)[:80]
    return DataError(
        f"{sample.where}: {name!r} is {shown}; allowed: {allowed}, which this task needs; name another field, or "
        "filter the sample out with `where`"
    )
