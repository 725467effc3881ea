"""Which samples a data entry's ``where`` keeps, by their metadata.

A value that is allowed is a text, a JSON value written as text (``true``, ``3``), or comparisons with numbers:
``>= 256``, or several that all have to hold: ``>= 0.3 < 0.9``. Numbers are compared as numbers: ``3`` allows 3.0.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from omnivl.data.metadata import MAX_VALUES, FieldColumns, as_number
from omnivl.errors import DataError

Where = Mapping[str, tuple[str, ...]]

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_COMPARISON = re.compile(rf"\s*(<=|>=|<|>)\s*({_NUMBER})\s*")


def matches(meta: Mapping[str, object], where: Where) -> bool:
    """Whether a sample's metadata passes a filter. For sources that have no index."""
    return all(name in meta and value_matches(meta[name], allowed) for name, allowed in where.items())


def value_matches(value: object, allowed: tuple[str, ...] | None) -> bool:
    """Whether a metadata value is among ``allowed``; of a list, whether one of its entries is. None allows anything."""
    if isinstance(value, list):
        return any(value_matches(entry, allowed) for entry in value)
    if allowed is None or (value if isinstance(value, str) else json.dumps(value)) in allowed:
        return True
    number = as_number(value)
    return number is not None and any(_holds(one, number) for one in allowed)


def rows_that_match(
    fields: FieldColumns, length: int, name: str, allowed: tuple[str, ...] | None, shard: str
) -> NDArray[np.bool_]:
    """The samples of a shard that pass a filter, bool ``[N]``.

    Args:
        fields: The shard's metadata.
        length: N.
        name: The field.
        allowed: Its values; None for any.
        shard: For messages.

    Raises:
        DataError: The field has too many different texts to be filtered by.
    """
    if name not in fields.columns:
        return np.zeros(length, dtype=np.bool_)
    if name in fields:
        values, codes = fields[name]
        table = np.array([value_matches(json.loads(value), allowed) for value in values] + [False], dtype=np.bool_)
        return table[codes]  # code -1 reads the appended False
    try:
        numbers = fields.numbers(name)
    except KeyError as error:
        raise DataError(
            f"{shard}: the field {name!r} has more than {MAX_VALUES} different values that are no numbers; allowed in "
            "'where' are fields with fewer; filter by another one"
        ) from error
    present = ~np.isnan(numbers)
    found = [value_matches(number, allowed) for number in numbers[present].tolist()]
    present[present] = found
    return present


def _holds(allowed: str, number: float) -> bool:
    comparisons = _comparisons(allowed)
    return bool(comparisons) and all(_COMPARE[sign](number, bound) for sign, bound in comparisons)


@cache
def _comparisons(allowed: str) -> tuple[tuple[str, float], ...]:
    """The comparisons that a text consists of, with a number alone as two of them; none for any other text."""
    if re.fullmatch(_NUMBER, allowed):
        return ((">=", float(allowed)), ("<=", float(allowed)))
    found: list[tuple[str, float]] = []
    place = 0
    while match := _COMPARISON.match(allowed, place):
        found.append((match.group(1), float(match.group(2))))
        place = match.end()
    return tuple(found) if place == len(allowed) else ()
