import json
import pickle

import numpy as np
import pytest

from omnivl.data.hugging_face_tokenizer import HuggingFaceTokenizer
from omnivl.data.tokenizer import TextReader, WordPieceTokenizer, load_tokenizer
from omnivl.errors import DataError
from omnivl.objectives.mlm import first_of_word

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "heart", "un", "##happy", ",", "a", "-", "grin", "##ning", "e"]


def test_encoding_by_hand():
    tokenizer = WordPieceTokenizer([*SPECIAL, "[DEC]", *WORDS])
    ids = tokenizer.encode(["Red heart", "unhappy, a grinning", "zzz"], 6)
    assert ids.dtype == np.int64
    # [CLS] 2, [SEP] 3, [PAD] 0, [UNK] 1; words start at 6
    assert ids.tolist() == [[2, 6, 7, 3, 0, 0], [2, 8, 9, 10, 11, 3], [2, 1, 3, 0, 0, 0]]


def test_cut_texts_still_end():
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    assert tokenizer.encode(["a a a a a a"], 4).tolist() == [[2, 10, 10, 3]]
    assert [TextReader(tokenizer, 4).fits(text) for text in ("", "a", "a a", "a a a", "a a a a a")] == [
        *3 * [True],
        *2 * [False],
    ]


def test_decode_is_the_inverse():
    tokenizer = WordPieceTokenizer([*SPECIAL, "[DEC]", *WORDS])
    for text in ("red heart", "unhappy, a grinning"):
        assert tokenizer.decode(tokenizer.encode([text], 12)[0]) == text
    assert tokenizer.decode([tokenizer.special.decode, 6, 3, 7, 7]) == "red", "up to [SEP], without [DEC]"


def test_accents_and_case():
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    assert tokenizer.encode(["É"], 3).tolist() == tokenizer.encode(["e"], 3).tolist()


def test_words_that_are_cut_here_are_those_of_the_pipeline():
    tokenizer = load_tokenizer("emoji")
    assert isinstance(tokenizer, WordPieceTokenizer)
    marks = [chr(code) for code in range(32, 127)]
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(marks, size=40)) for _ in range(300)]
    texts += [
        "",
        "   ",
        "a  b",
        "Man: Medium-Light Skin Tone",
        "O'Clock_12",
        "[MASK] [SEP]",
        "x" * 101,
        "x" * 101 + ".",
    ]
    texts += ["tab\there", "new\nline", "naïve café", "\x7f\x00a", "日本 emoji"]
    for text in texts:
        for _ in range(2):  # the second time from memory
            assert tokenizer._words(text) == tokenizer._pieces(text), repr(text)


def test_the_start_of_generation():
    with_own = WordPieceTokenizer([*SPECIAL, "[DEC]", *WORDS]).special
    assert (with_own.decode, with_own.vocab_size, with_own.num_reserved) == (5, 16, 6)
    unused = WordPieceTokenizer(["[PAD]", "[unused0]", "[unused1]", *SPECIAL[1:], *WORDS]).special
    assert (unused.decode, unused.vocab_size, unused.num_reserved) == (1, 17, 7), "the size stays"
    added = WordPieceTokenizer([*SPECIAL, *WORDS]).special
    assert (added.decode, added.vocab_size, added.num_reserved) == (15, 16, 5), "the vocabulary grows"


def test_a_pickled_tokenizer_is_the_same():
    tokenizer = WordPieceTokenizer([*SPECIAL, *WORDS])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.special == tokenizer.special
    assert copy.encode(["red grinning"], 8).tolist() == tokenizer.encode(["red grinning"], 8).tolist()


def test_vocabulary_files(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    assert load_tokenizer(str(path)).special.vocab_size == 16
    assert load_tokenizer(str(tmp_path)).special.vocab_size == 16, "a folder with nothing but the file"


def test_wrong_vocabularies(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(DataError) as error:
        load_tokenizer(str(path))
    assert str(error.value) == (f"tokenizer {path}: [SEP], [MASK] missing; needed: [PAD], [UNK], [CLS], [SEP], [MASK]")
    path.write_text("\n".join([*SPECIAL, "a", "a"]))
    with pytest.raises(DataError) as error:
        load_tokenizer(str(path))
    assert str(error.value) == f"tokenizer {path}: the word 'a' stands twice; each word needs its own line"
    with pytest.raises(DataError, match=r"absent.txt: cannot be read as a vocabulary: No such file or directory; name"):
        load_tokenizer(str(tmp_path / "absent.txt"))


def test_why_a_tokenizer_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load_tokenizer("data/words")
    assert str(error.value) == (
        f"tokenizer 'data/words' cannot be loaded: there is no folder of that name in {tmp_path}, nor a cached "
        "tokenizer; allowed: 'emoji', a vocab.txt, or a folder with a Hugging Face tokenizer"
    )
    with pytest.raises(DataError, match="there is no folder of that name"):
        load_tokenizer("é" * 200)  # too long for a name
    described = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(DataError, match=r"cannot be loaded: its class is code that lies in the folder, and such code"):
        load_tokenizer(str(tmp_path))


def test_hugging_face_folders(tmp_path):
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    own = WordPieceTokenizer([*SPECIAL, *WORDS])
    texts = ["Red heart", "unhappy, a grinning", "zzz"]
    assert tokenizer.encode(texts, 8).tolist() == own.encode(texts, 8).tolist()
    assert tokenizer.special == own.special, "[DEC] is added at the end in both"
    assert tokenizer.decode(tokenizer.encode(["red heart"], 8)[0]) == "red heart"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(texts, 8).tolist() == own.encode(texts, 8).tolist()


def test_a_tokenizer_without_a_mask_token_gets_one(tmp_path):
    """As CLIP's, whose end token is the padding, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pipeline = Tokenizer(models.WordLevel({"red": 0, "heart": 1, "?": 2, "<start>": 3, "<end>": 4}, unk_token="?"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "?"}
    PreTrainedTokenizerFast(tokenizer_object=pipeline, **ends).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    special = tokenizer.special
    assert (special.pad, special.cls, special.sep, special.vocab_size) == (4, 3, 4, 7)
    assert {special.decode, special.mask} == {5, 6}
    ids = tokenizer.encode(["red heart"], 6)
    assert ids.tolist() == [[3, 0, 1, 4, 4, 4]]
    assert tokenizer.decode(ids[0]) == "red heart"
    tokenizer.as_transformers(6).save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).special == special


def test_no_such_tokenizer(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder has neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "NoSuchTokenizer"}))
    with pytest.raises(DataError, match=r"cannot be loaded: .*; allowed: 'emoji', a vocab.txt, or a folder"):
        load_tokenizer(str(tmp_path / "broken"))


def vocabulary_of(pieces: list[str], kind: str) -> HuggingFaceTokenizer:
    """A tokenizer of these pieces, of each kind's own splitting."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {piece: number for number, piece in enumerate(["<pad>", "<s>", "</s>", "<unk>", *pieces])}
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(piece, -float(len(ids) - len(piece))) for piece in ids], unk_id=3))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    else:
        ending = {"end_of_word_suffix": "</w>"} if kind == "clip" else {}
        merges = [("c", "a"), ("ca", "t</w>")] if kind == "clip" else [("a", "t"), ("\u0120", "c")]
        backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", **ending))
        if kind == "clip":
            backend.normalizer = normalizers.Lowercase()
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("unigram", ["\u2581c", "at", "s", "\u2581", "c", "a", "t"]),
        ("bytes", ["\u0120", "c", "a", "t", "s", "at", "\u0120c"]),
        ("clip", ["c", "a", "t", "s", "t</w>", "s</w>", "c</w>", "a</w>", "ca", "cat</w>"]),
    ],
)
def test_words_are_found_among_their_pieces(kind: str, pieces: list[str]) -> None:
    tokenizer = vocabulary_of(pieces, kind)
    ids = tokenizer.encode(["cats cat", "cat"], 12)
    first = first_of_word(ids, tokenizer)
    words = [
        tokenizer.decode([tokenizer.special.cls, *ids[0][first[0] == place], tokenizer.special.sep])
        .replace("</w>", "")
        .replace("\u0120", "")
        .replace(" ", "")
        for place in dict.fromkeys(first[0].tolist())
    ]
    assert [word for word in words if word] == ["cats", "cat"]
    assert len(ids[0][(first[0] == 1)]) > 1, "a word of several pieces"
    specials = np.isin(ids, [*tokenizer.special.roles.values()])
    assert (first[specials] == np.nonzero(specials)[1]).all(), "special tokens are words of their own"


def test_words_of_word_pieces() -> None:
    tokenizer = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "##es", "a", "."])
    ids = tokenizer.encode(["a cats. cat", "cates"], 9)
    assert first_of_word(ids, tokenizer).tolist() == [[0, 1, 2, 2, 4, 5, 6, 7, 8], [0, 1, 1, 3, 4, 5, 6, 7, 8]]
