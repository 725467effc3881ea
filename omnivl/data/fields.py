"""Fields of a sample beside its picture and its text: answers, weights, boxes, masks, options, history.

A data entry maps the names that objectives use to fields of the sample's JSON or to files (``fields: {answers: answers,
region: bbox, mask: mask.png}``). An objective declares the types of its fields; a field that no objective declares is
kept unchanged.

Shapes: N values of a sample, S side of the view, L token positions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from omnivl.data.config import DataEntryConfig
from omnivl.data.decode import decode_mask
from omnivl.data.formats import file_named
from omnivl.data.limits import DEFAULT_LIMITS, DecodeLimits
from omnivl.data.placement import Placement
from omnivl.data.sources.base import BadSampleError, Sample

FieldKind = Literal["text", "number", "boxes", "mask", "raw"]


@dataclass(frozen=True)
class Field:
    """The type of a sample's field that an objective declares.

    A batch has a ``text`` as tuples of strings, a ``number`` as float32 ``[B]``, ``boxes`` as float32 ``[B, 4]`` (left,
    top, right, bottom as fractions of the view) and a ``mask`` as bool ``[B, S, S]``; ``raw`` is any JSON value. If
    ``most`` is above 1 there is a further dimension, padded with zeros; ``NAME/present``, bool ``[B]`` or ``[B,
    most]``, marks the values that exist.

    Attributes:
        kind: Its type.
        most: Largest number of values of a sample; a sample with more is bad. 1 is a single value, not a list.
        required: Whether a sample without it is bad. A sample whose box is outside the view is not bad: its box is
            absent.
        as_many_as: Another field that must have the same number of values, as answers for their weights.
        length: Token positions of a ``text``, for a further tensor ``NAME/token_ids``, int64 ``[B, L]`` or ``[B, most,
            L]``; 0 for none.
        picture: Index of the sample's picture to which boxes and masks refer.
    """

    kind: FieldKind = "raw"
    most: int = 1
    required: bool = True
    as_many_as: str | None = None
    length: int = 0
    picture: int = 0


@dataclass(frozen=True)
class Placed:
    """Boxes or masks in the view; those outside of it are zeros and not present.

    Attributes:
        values: float64 boxes ``[N, 4]`` or bool masks ``[N, S, S]``.
        present: bool ``[N]``.
    """

    values: NDArray[np.float64] | NDArray[np.bool_]
    present: NDArray[np.bool_]


class FieldReader:
    """Reads the fields that one data entry keeps."""

    def __init__(
        self, config: DataEntryConfig, asked: Mapping[str, Field], limits: DecodeLimits = DEFAULT_LIMITS
    ) -> None:
        """Describes a reader.

        Args:
            config: The entry.
            asked: Types of fields by name; others are kept as they are, files as masks.
            limits: Bounds of masks.
        """
        self._pictures, self._limits = config.pictures, limits
        self._sources = config.kept_fields
        self.types = {
            name: asked.get(name, Field("mask" if source in config.field_files else "raw", required=False))
            for name, source in self._sources.items()
        }

    def read(self, sample: Sample) -> dict[str, object]:
        """The checked fields of a sample. A missing field that is not required is None.

        Returns:
            By name a value, or a tuple if there may be several: str, float, or any JSON value; for boxes and masks
                arrays over the whole picture: float64 ``[N, 4]``, bool ``[N, H, W]``.

        Raises:
            BadSampleError: ``missing_field``, ``wrong_field``, or see ``decode_mask``.
        """
        found: dict[str, object] = {}
        for name, field in self.types.items():
            source = self._sources[name]
            value = self._mask(sample, source, field) if field.kind == "mask" else field_value(sample, source)
            if value is None and field.required:
                detail = f"nothing in {source!r}, which is wanted as {name!r}"
                raise BadSampleError("missing_field", sample.where, detail)
            found[name] = None if value is None else _checked(value, field, source, sample.where)
        for name, field in self.types.items():
            other = None if field.as_many_as is None else found.get(field.as_many_as)
            if other is not None and found[name] is not None and _count(found[name]) != _count(other):
                detail = f"{_count(found[name])} in {self._sources[name]!r}, {_count(other)} in {field.as_many_as!r}"
                raise BadSampleError("wrong_field", sample.where, f"{detail}; allowed: as many")
        return found

    def place(self, found: Mapping[str, object], places: Sequence[Placement], size: int) -> dict[str, object]:
        """The fields of a sample, with boxes and masks mapped into its views.

        Args:
            found: From ``read``.
            places: For each picture, the map of its points into its view.
            size: S.
        """
        placed = dict(found)
        for name, field in self.types.items():
            value = found[name]
            if field.kind == "boxes" and isinstance(value, np.ndarray):
                placed[name] = Placed(*places[field.picture].boxes(value))
            elif field.kind == "mask" and isinstance(value, np.ndarray):
                masks = np.stack([places[field.picture].mask(mask, size) for mask in value])
                placed[name] = Placed(masks, np.array([mask.any() for mask in masks], dtype=np.bool_))
        return placed

    def _mask(self, sample: Sample, source: str, field: Field) -> NDArray[np.bool_] | None:
        """The mask in a file of the sample, ``[1, H, W]``; None without a file."""
        if source not in sample.members:
            return None
        picture = sample.media
        if self._pictures:
            name = file_named(self._pictures[field.picture], sample.members)
            picture = None if name is None else sample.members[name]
        return decode_mask(sample, source, picture, self._limits)[None]


def blank_value(field: Field, size: int) -> object:
    """An example value of a field with the largest number of values, for views of side ``size``; None for a raw one."""
    present = np.ones(field.most, dtype=np.bool_)
    match field.kind:
        case "raw":
            return None
        case "text" | "number":
            one = "a" if field.kind == "text" else 1.0
            return one if field.most == 1 else (one,) * field.most
        case "boxes":
            return Placed(np.tile([0.0, 0.0, 1.0, 1.0], (field.most, 1)), present)
        case "mask":
            return Placed(np.ones((field.most, size, size), dtype=np.bool_), present)


def field_value(sample: Sample, source: str) -> object:
    """The value of a field of a sample's JSON; None if it is missing."""
    if source in ("caption", "captions"):
        return list(sample.captions) or None
    if source == "identity":
        return sample.identity
    return sample.meta.get(source)


def texts_in(value: object) -> Iterator[str]:
    """All strings in a value of a field, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def _count(value: object) -> int:
    return len(value) if isinstance(value, tuple | np.ndarray) else 1


def _checked(value: object, field: Field, source: str, where: str) -> object:
    """A value of the type that is asked for.

    Raises:
        BadSampleError: ``wrong_field``: it is not.
    """
    if field.kind == "raw" or isinstance(value, np.ndarray):
        return value
    one_box = field.kind == "boxes" and isinstance(value, list) and value and not isinstance(value[0], list | Mapping)
    values = [_of_region(one, field) for one in (value if isinstance(value, list) and not one_box else [value])]
    if len(values) > field.most or (field.most == 1 and not values):
        detail = f"{len(values)} values in {source!r}; allowed: {'1' if field.most == 1 else f'at most {field.most}'}"
        raise BadSampleError("wrong_field", where, detail)
    match field.kind:
        case "text":
            read: list[object] = [one for one in values if isinstance(one, str) and one.strip()]
            allowed = "texts that are not empty"
        case "number":
            read = [float(one) for one in values if _is_number(one)]
            allowed = "finite numbers"
        case _:
            read = [box for one in values if (box := _box(one)) is not None]
            allowed = "boxes [left, top, right, bottom] as fractions of width and height, from 0 to 1"
    if len(read) != len(values):
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise BadSampleError("wrong_field", where, f"{source!r} is {shown}; allowed: {allowed}")
    if field.kind == "boxes":
        return np.array(read, dtype=np.float64).reshape(-1, 4)
    return tuple(read) if field.most > 1 else read[0]


def _of_region(value: object, field: Field) -> object:
    """The text or the box of a region, an object with ``caption`` or ``attribute`` and ``box``; else the value."""
    if not isinstance(value, Mapping):
        return value
    names = {"text": ("attribute", "caption"), "boxes": ("box",)}.get(field.kind, ())
    return next((value[name] for name in names if name in value), value)


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _box(value: object) -> tuple[float, ...] | None:
    """A box: four fractions, right and bottom larger than left and top; None for anything else."""
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(one) for one in value):
        return None
    left, top, right, bottom = (float(one) for one in value)
    return (left, top, right, bottom) if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 else None
