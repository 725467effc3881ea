import pytest
from annotated_types import Ge, Gt, Le, Lt

from moe.ranges import Range


@pytest.mark.parametrize(
    ("bounds", "words", "limits"),
    [
        (Range(1), "1 or more", [Ge(1)]),
        (Range(above=0), "more than 0", [Gt(0)]),
        (Range(0, 0.5), "from 0 to 0.5", [Ge(0), Le(0.5)]),
        (Range(0, below=1), "at least 0 and less than 1", [Ge(0), Lt(1)]),
        (Range(above=0, high=1), "more than 0 and at most 1", [Le(1), Gt(0)]),
        (Range(above=0, below=1), "more than 0 and less than 1", [Gt(0), Lt(1)]),
        (Range(high=3), "at most 3", [Le(3)]),
    ],
)
def test_words_and_limits(bounds: Range, words: str, limits: list[object]) -> None:
    assert str(bounds) == words
    assert list(bounds) == limits


def test_nearest_number_is_a_bound_of_the_range() -> None:
    assert [Range(1, 4).nearest(value) for value in (0, 1, 3, 5.5)] == [1, None, None, 4]
    assert Range(above=0, below=1).nearest(2) is None
