"""Fields of samples that tasks read, each checked."""

from collections.abc import Sequence
from typing import Any

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError


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


def texts_of(sample: Sample, name: str) -> list[str]:
    """A list of texts, at least one.

    Raises:
        DataError: It is not there, or no such list.
    """
    found = _of_type(sample, name, list, "a list of texts")
    if not found or not all(isinstance(one, str) for one in found):
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
    if len(found) != 4 or not all(isinstance(one, int | float) for one in found):
        raise _lacking(sample, name, found, "a box [left, top, right, bottom]")
    return [float(one) for one in found]


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
