import pytest

from omnivl.tasks.captions import keyword_f1, keywords


def test_keywords_leave_out_articles_and_case() -> None:
    assert keywords("The Face with a Party-Hat") == {"face", "party", "hat"}


@pytest.mark.parametrize(
    ("written", "reference", "expected"),
    [
        ("red heart", "red heart", 1.0),
        ("red heart", "black heart", 0.5),  # 2 * 1 / (2 + 2)
        ("heart", "black heart", 2 / 3),  # 2 * 1 / (1 + 2)
        ("the", "a", 0.0),  # nothing but articles
        ("", "heart", 0.0),
    ],
)
def test_keyword_f1_by_hand(written: str, reference: str, expected: float) -> None:
    assert keyword_f1(written, reference) == pytest.approx(expected)
