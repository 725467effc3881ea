import pytest

from omnivl.data.tokenizer import load_tokenizer
from omnivl.tasks.spelling import comparable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red  Heart", "a red heart"),
        ("Don't: a Café", "don ' t : a cafe"),
        ("Medium-Light", "medium - light"),
        ("STRASSE straße", "strasse strasse"),
        ("3.5%", "3 . 5 %"),
        ("日本の猫", "日 本 の 猫"),
        ("a_b", "a _ b"),
        ("한국어", "한국어"),
        ("İstanbul", "istanbul"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_by_hand(text: str, expected: str) -> None:
    assert comparable(text) == expected
    assert comparable(expected) == expected


@pytest.mark.parametrize("text", ["A Red-Heart, beating", "O'Clock 3:30!", "naïve CAFÉ (old)", "e.g. a dog face", "#1"])
def test_what_a_tokenizer_decodes_compares_equal(text: str) -> None:
    tokenizer = load_tokenizer("emoji")
    assert comparable(tokenizer.decode(tokenizer.encode([text], 64)[0])) == comparable(text)
