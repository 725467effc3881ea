"""Scores of captions: by hand, and as the official program has them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from omnivl.errors import DataError, UserError
from omnivl.tasks.scorers import captions
from omnivl.tasks.scorers.captions import caption_scores, package_folder, plain_tokens, ptb_tokens

REASON = "pycocoevalcap is not installed: the extra 'tasks'"
NO_JAVA = ("BLEU-4", "ROUGE-L", "CIDEr-D")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="java runs the official tokenizer")

REFERENCES = [
    ["A man rides a brown horse.", "There's a person on a horse!"],
    ["Two dogs play near the café — outside", "dogs and a cat"],
    ["An x-ray of someone's hand (left)", "it costs $5.00"],
]
WRITTEN = ["a man riding a horse", "two dogs play in a café", ""]


def test_where_the_package_lacks_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        caption_scores(["a"], [["a"]])
    assert str(error.value) == "pycocoevalcap is not installed, which scores captions; install the extra 'tasks'"


@pytest.mark.parametrize(
    ("written", "references", "message"),
    [
        ([], [], "0 captions and 0 pictures' references cannot be scored"),
        (["a"], [["a"], ["b"]], "1 captions and 2 pictures' references cannot be scored"),
        (["a", "b"], [["a"], []], "1 of 2 pictures have no reference, the first at 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(written: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(DataError) as error:
        caption_scores(written, references)
    assert str(error.value) == message


class TestWithoutJava:
    @pytest.fixture(autouse=True)
    def no_java(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("pycocoevalcap", reason=REASON)
        monkeypatch.setattr(captions.shutil, "which", lambda program: None)

    def test_what_needs_java_is_left_out_and_said(self) -> None:
        found = caption_scores(WRITTEN, REFERENCES)
        assert found.left_out == dict.fromkeys(("METEOR", "SPICE"), "needs java, which is not on this machine's PATH")
        assert tuple(found.values) == NO_JAVA
        assert found.tokenizer == "plain"

    def test_equal_captions_have_the_largest_scores(self) -> None:
        texts = ["a man rides a horse", "two dogs play outside now"]
        found = caption_scores(texts, [[text] for text in texts])
        assert found.values == pytest.approx({"BLEU-4": 1.0, "ROUGE-L": 1.0, "CIDEr-D": 10.0})

    def test_values_are_means_of_single_ones_but_bleu(self) -> None:
        found = caption_scores(WRITTEN, REFERENCES)
        assert found.each.keys() == {"ROUGE-L", "CIDEr-D"}
        for name, each in found.each.items():
            assert found.values[name] == pytest.approx(each.mean())
            assert each[2] == 0.0, "the empty caption"

    def test_bleu_by_hand(self) -> None:
        # In common: 5 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; 5 words where the reference has 6.
        found = caption_scores(["a man rides a horse"], [["a man rides a big horse"]], ["BLEU-4"])
        assert found.values["BLEU-4"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * np.exp(1 - 6 / 5), rel=1e-6)

    def test_rouge_by_hand(self) -> None:
        # Longest common subsequence "a man a horse", 4; of 6 words written and 5 of the reference.
        found = caption_scores(["a man on a big horse"], [["a man rides a horse"]], ["ROUGE-L"])
        precision, recall, beta = 4 / 6, 4 / 5, 1.2
        expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
        assert found.values == {"ROUGE-L": pytest.approx(expected)}

    def test_document_frequencies_of_cider_are_those_of_the_set(self) -> None:
        # One picture: each word is in all pictures, log(1 / 1) is 0. With a second one there is something to tell.
        written, references = ["a red dog", "a blue cat"], [["a red dog"], ["a blue cat"]]
        assert caption_scores(written[:1], references[:1], ["CIDEr-D"]).values["CIDEr-D"] == 0.0
        both = caption_scores(written, references, ["CIDEr-D"]).each["CIDEr-D"]
        # Of 1- to 4-grams all but the 4-grams, which three words lack, match: 10 * 3 / 4.
        assert both.tolist() == pytest.approx([7.5, 7.5])

    def test_cider_counts_a_repeated_word_as_often_as_the_reference_has_it(self) -> None:
        references = [["red"], ["blue"]]
        once, twice = (
            caption_scores([text, "blue"], references, ["CIDEr-D"]).each["CIDEr-D"][0] for text in ("red", "red red")
        )
        # Unigrams alone. Clipped, min(2, 1) * 1 / (2 * 1); a bigram more: the length penalty e^(-1 / 72).
        assert once == pytest.approx(2.5)
        assert twice == pytest.approx(2.5 / 2 * np.exp(-1 / 72))


def test_tokens_without_java() -> None:
    assert plain_tokens("There's a dog (brown), isn't it?") == "there 's a dog -lrb- brown -rrb- is n't it"
    assert plain_tokens("  \n ") == ""


TEXTS = (
    "A man isn't riding a horse, is he?",
    "There's a dog (brown) on the couch.",
    "A street sign says \"STOP\" in white; or: 'GO'...",
    "A 3.5-inch x-ray of someone's hand at the U.S. Open",
    "They're gonna play and cannot stop: $5.00 or 50%!",
    "A café in Paris — at 10:30",
    "",
)


@needs_java
def test_the_plain_tokenizer_is_the_official_one_for_captions() -> None:
    pytest.importorskip("pycocoevalcap", reason=REASON)
    java = shutil.which("java")
    assert java is not None
    assert ptb_tokens(TEXTS, package_folder(), java) == [plain_tokens(text) for text in TEXTS]


@needs_java
def test_tokens_are_those_of_the_package() -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason=REASON).PTBTokenizer()
    java = shutil.which("java")
    assert java is not None
    theirs = tokenizer.tokenize({number: [{"caption": text}] for number, text in enumerate(TEXTS)})
    assert ptb_tokens(TEXTS, package_folder(), java) == [theirs[number][0] for number in range(len(TEXTS))]


@needs_java
def test_line_breaks_do_not_move_captions_to_other_pictures() -> None:
    pytest.importorskip("pycocoevalcap", reason=REASON)
    java = shutil.which("java")
    assert java is not None
    broken = ["a\u2028b", "c\r\nd", "e\x85f\x0b", "g"]
    assert ptb_tokens(broken, package_folder(), java) == ["a b", "c d", "e f", "g"]


@needs_java
@pytest.mark.full
def test_scores_are_those_of_the_official_program() -> None:
    """As pycocoevalcap's eval.py computes them."""
    pytest.importorskip("pycocoevalcap", reason=REASON)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    right = {number: [{"caption": text} for text in own] for number, own in enumerate(REFERENCES)}
    given = {number: [{"caption": text}] for number, text in enumerate(WRITTEN)}
    right, given = PTBTokenizer().tokenize(right), PTBTokenizer().tokenize(given)
    expected = {
        "BLEU-4": Bleu(4).compute_score(right, given)[0][3],
        "METEOR": Meteor().compute_score(right, given)[0],
        "ROUGE-L": Rouge().compute_score(right, given)[0],
        "CIDEr-D": Cider().compute_score(right, given)[0],
    }
    found = caption_scores(WRITTEN, REFERENCES, tuple(expected))
    assert found.values == expected
    assert found.tokenizer == "ptb"


@pytest.fixture
def broken_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap", reason=REASON)
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'no such class' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.usefixtures("broken_java")
def test_a_tokenizer_that_fails_is_no_score() -> None:
    with pytest.raises(UserError, match=r"the tokenizer of captions failed .* it said 'no such class'"):
        caption_scores(["a"], [["a"]])


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("broken_java")
def test_a_meteor_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "ptb_tokens", lambda texts, folder, java: list(texts))
    found = caption_scores(["a b"], [["a b"]], ["METEOR", "ROUGE-L"])
    assert found.values == {"ROUGE-L": 1.0}
    assert found.left_out["METEOR"].startswith("its java program failed: ")


def test_spice_without_its_models_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap", reason=REASON)
    monkeypatch.setattr(captions.shutil, "which", lambda program: "java")
    monkeypatch.setattr(captions, "ptb_tokens", lambda texts, folder, java: list(texts))
    monkeypatch.setattr(captions, "package_folder", lambda: tmp_path)
    found = caption_scores(["a b"], [["a b"]], ["SPICE"])
    assert found.values == {}
    assert found.left_out == {
        "SPICE": "its models are not there; `python -m pycocoevalcap.spice.get_stanford_models` downloads them"
    }
