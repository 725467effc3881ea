"""What the package assumes of a tokenizer, and what it refuses."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from omnivl.architectures import ALBEF, CLIP, OmniVL
from omnivl.architectures.build import build_chain
from omnivl.data.hugging_face_tokenizer import HuggingFaceTokenizer
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import WordPieceTokenizer, load_tokenizer
from omnivl.errors import DataError, ModelError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
NAMES = {name: number for number, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}


def words(*more, splitter=None, unknown="<unk>", **roles):
    """A tokenizer of whole words."""
    vocabulary = {**NAMES, **{word: len(NAMES) + place for place, word in enumerate(more)}}
    pipeline = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    pipeline.pre_tokenizer = splitter or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=pipeline, **{**ROLES, **roles})


def pieces():
    """A Unigram, whose control tokens are pieces like others, of the highest score."""
    scores = [*((name, 0.0) for name in NAMES), ("▁a", -2.0), ("▁", -2.0), *((mark, -5.0) for mark in "a</s>mk")]
    pipeline = Tokenizer(models.Unigram(scores, NAMES["<unk>"], False))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=pipeline, **ROLES)


def bert(folder):
    from transformers import BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, "[", "]", "sep", "mask", "cls", "pad", "dec", "a"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return load_tokenizer(str(folder / "bert"))


@pytest.mark.parametrize("written", ["[SEP]", "[MASK]", "[CLS]", "[PAD]", "[DEC]", "[sep]"])
def test_control_tokens_in_a_caption_are_text(tmp_path, written):
    tokenizer = bert(tmp_path)
    own = load_tokenizer(str(tmp_path / "vocab.txt"))
    # [CLS] a [ sep ] a [SEP]
    name = tokenizer._words(written.strip("[]"))[0]
    expected = [[2, 12, 5, name, 6, 12, 3, 0]]
    assert tokenizer.encode([f"a {written} a"], 8).tolist() == expected
    assert own.encode([f"a {written} a"], 8).tolist() == expected
    exported = tokenizer.as_transformers(8)
    exported.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert again.encode([f"a {written} a"], 8).tolist() == expected
    assert exported(f"a {written} a")["input_ids"] == [2, 12, 5, name, 6, 12, 3]


@pytest.mark.parametrize("make", [pieces, lambda: words("a", splitter=pre_tokenizers.WhitespaceSplit())])
@pytest.mark.parametrize("written", ["</s>", "<mask>", "<pad>", "<s>", "[DEC]"])
def test_words_of_the_vocabulary_that_are_control_tokens(make, written):
    tokenizer = HuggingFaceTokenizer(make())
    special = tokenizer.special
    for text in (f"a {written} a", f"a{written}a", written, written * 3):
        ids = tokenizer.encode([text], 40)[0].tolist()
        end = ids.index(special.sep)
        assert set(ids[1:end]).isdisjoint(special.roles.values()), text
        assert set(ids[end + 1 :]) <= {special.pad}, text


def test_unigram_spells_a_control_token_in_other_pieces():
    tokenizer = HuggingFaceTokenizer(pieces())
    marks = {mark: place for place, mark in enumerate("a</s>mk", start=7)}
    # "▁a" "▁" "<" | "▁" "/" "s" ">"
    ids = [5, 6, marks["<"], 6, marks["/"], marks["s"], marks[">"]]
    assert tokenizer.encode(["a </s>"], 10)[0].tolist() == [0, *ids, 2, 1]


def test_padding_that_is_the_end():
    tokenizer = HuggingFaceTokenizer(words("a", pad_token="</s>"))
    tokens = tokenizer.special
    assert tokens.pad == tokens.sep
    small = OmniVL.presets["tiny"]
    with pytest.raises(ModelError) as error:
        build_chain(replace(small, vocab_size=64), (), tokens)
    assert str(error.value) == (
        "tokenizer: got a tokenizer whose padding is its end token, id 2; allowed padding of its own with architecture "
        "'omnivl', which would not read the end; give it a pad token of its own, or use another tokenizer"
    )
    with pytest.raises(ModelError, match="architecture 'albef', which would not read the end"):
        build_chain(ALBEF(), (), tokens)
    build_chain(CLIP.presets["tiny"], (), tokens)  # reads up to the first end
    with pytest.raises(ModelError, match="start is its end token, id 2; allowed two tokens with architecture 'clip'"):
        build_chain(CLIP.presets["tiny"], (), replace(tokens, cls=tokens.sep, pad=1))


def test_one_token_as_start_and_end():
    """As OPT's."""
    tokenizer = HuggingFaceTokenizer(words("a", bos_token="</s>"))
    ids = tokenizer.encode(["a a"], 6)[0].tolist()
    assert ids == [2, 5, 5, 2, 1, 1]
    assert tokenizer.decode(ids) == "a a"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"pad_token": "<s>"}, "got one token, id 0, as pad and as start; allowed are two; give it a pad token of its"),
        ({"mask_token": "</s>"}, "got one token, id 2, as mask and as end; allowed are two; give it a mask token of"),
        ({"mask_token": "<pad>"}, "got one token, id 1, as mask and as pad; allowed are two; give it a mask token of"),
        ({"unk_token": "</s>", "unknown": "</s>"}, r"got unknown words as \['</s>'\], which are control tokens"),
        ({"unk_token": "<mask>", "unknown": "<mask>"}, r"got unknown words as \['<mask>'\], which are control"),
        ({"unknown": "nope"}, "cannot encode 'A red heart.*; give it an unknown token that its vocabulary has"),
    ],
)
def test_tokens_that_cannot_be_told_apart(roles, message):
    with pytest.raises(DataError, match=f"^tokenizer 'mine': {message}"):
        HuggingFaceTokenizer(words("a", **roles), "mine")


def test_ids_outside_of_the_vocabulary():
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=5, num_reserved=5)
    tokens.check("mine")
    with pytest.raises(DataError) as error:
        replace(tokens, mask=5).check("mine")
    assert str(error.value) == (
        "tokenizer 'mine': got id 5 for the mask token; allowed are 0 to 4, the ids of its vocabulary; give it a mask "
        "token of its vocabulary"
    )


def test_a_vocabulary_with_holes():
    pipeline = Tokenizer(models.WordLevel({**NAMES, "a": 90}, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=pipeline, **ROLES))
    assert tokenizer.special.vocab_size > 90
    assert tokenizer.encode(["a"], 3)[0].tolist() == [0, 90, 2]


def test_dropout():
    letters = {letter: len(NAMES) + place for place, letter in enumerate("ab")}
    pipeline = Tokenizer(models.BPE({**NAMES, **letters, "ab": 7}, [("a", "b")], dropout=0.5, unk_token="<unk>"))
    with pytest.raises(DataError, match=r"got dropout 0\.5, by which a text has other ids each time; allowed is none"):
        HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=pipeline, **ROLES))


def test_half_a_surrogate_pair(tmp_path):
    """JSON may hold one; no text file can."""
    whole, high, low = "a \U0001f600 a", json.loads('"a \\ud83d a"'), json.loads('"a \\ude00 a"')
    for tokenizer in (WordPieceTokenizer([*SPECIAL, "a"]), bert(tmp_path), HuggingFaceTokenizer(words("a"))):
        unknown = tokenizer.encode(["a \ufffd a"], 8).tolist()
        assert tokenizer.encode([high, low], 8).tolist() == unknown * 2
        assert tokenizer.encode(["a \ud83d\ude00 a"], 8).tolist() == tokenizer.encode([whole], 8).tolist()


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_within_words_of_a_vocabulary(tmp_path, mark, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes(end.join([*SPECIAL, f"a{mark}b", "c", ""]).encode())
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.special.vocab_size == 8, "7 words and [DEC]"
    assert tokenizer.encode(["c"], 3).tolist() == [[2, 6, 3]]


def test_a_vocabulary_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "c"]), encoding="utf-8-sig")
    assert load_tokenizer(str(path)).encode(["c"], 3).tolist() == [[2, 5, 3]]


def test_code_in_a_folder_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import BertTokenizer as Own\n"
    )
    auto_map = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Own"}))
    (tmp_path / "vocab.txt").write_text("\n".join(SPECIAL))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match="cannot be loaded: "):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_without_an_end(tmp_path, name):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    named = [str(tmp_path)] + ([str(tmp_path / name)] if name == "vocab.txt" else [])
    for one in named:
        with pytest.raises(DataError, match=rf"{name}: got what is no plain file \(a folder, device or pipe\)"):
            load_tokenizer(one)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for one in named:
        with pytest.raises(DataError, match=rf"{name}: got what is no plain file"):
            load_tokenizer(one)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(3_700_000_000)
    for one in named:
        with pytest.raises(DataError, match=rf"{name}: got 3,700,000,000 bytes; allowed are 67,108,864"):
            load_tokenizer(one)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', '{"version": "1.0"}', "[" * 5000])
def test_broken_files_of_a_folder(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(DataError, match="cannot be loaded: "):
        load_tokenizer(str(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"got a file; allowed: 'emoji', a vocab\.txt, or a folder .*; name its folder"):
        load_tokenizer(str(file))
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(DataError, match="cannot be loaded: "):
            load_tokenizer(name)


@pytest.mark.parametrize("make", [pieces, lambda: words("a"), lambda: words("a", padding_side="left")])
def test_a_tokenizer_that_adds_no_start_and_end_is_exported_with_ours(tmp_path, make):
    tokenizer = HuggingFaceTokenizer(make())
    assert tokenizer.as_transformers(8)("a a")["input_ids"] == tokenizer.encode(["a a"], 4)[0].tolist()
    tokenizer.as_transformers(5).save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a a", "a </s> a a a a", ""]
    ids = read(texts[::2], padding="max_length", truncation=True)["input_ids"]
    assert ids == tokenizer.encode(texts[::2], 5).tolist()
    assert load_tokenizer(str(tmp_path)).encode(texts, 5).tolist() == tokenizer.encode(texts, 5).tolist()


def test_random_texts_never_hold_a_control_token(tmp_path):
    """2,000 texts out of control tokens, marks, halves of surrogate pairs and letters."""
    random = np.random.default_rng(0)
    parts = [*NAMES, *SPECIAL, "[DEC]", "a", " ", "\0", "\ud83d", "\ude00", "\n", "<", ">", "日", "\U0001f600"]
    whitespace = pre_tokenizers.WhitespaceSplit()
    tokenizers = [bert(tmp_path), HuggingFaceTokenizer(pieces()), HuggingFaceTokenizer(words("a", splitter=whitespace))]
    for _ in range(2000):
        text = "".join(random.choice(parts, size=random.integers(0, 12)))
        for tokenizer in tokenizers:
            ids = tokenizer.encode([text], 64)[0].tolist()
            special = tokenizer.special
            end = ids.index(special.sep, 1)
            assert set(ids[1:end]).isdisjoint(special.roles.values()), repr(text)
            assert set(ids[end + 1 :]) <= {special.pad}, repr(text)
