"""Captions behind queries with the tokenizer of the language model: one of OPT's kind, from a folder."""

import pickle
from pathlib import Path

import pytest
import torch
from small_language import TOKENS, LetterTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omnivl.chain.positions import IGNORED
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import DATA_KINDS, Batch
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import TextInput, TextReader, load_readers
from omnivl.objectives import PrefixLM

SIZES = InputSizes(image_size=8, video_size=8, num_frames=2, patch_size=4, tubelet_size=1, text_length=6)


@pytest.fixture(scope="module")
def opt_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes as in GPT-2 and OPT, with one merge; start and end are one token, as in OPT."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, "ab"]
    pipeline = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("a", "b")]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    folder = tmp_path_factory.mktemp("opt")
    PreTrainedTokenizerFast(tokenizer_object=pipeline, **named).save_pretrained(folder)
    return folder


def prepared(readers: dict[str, TextReader], objective: PrefixLM, captions: tuple[str, ...]) -> dict[str, torch.Tensor]:
    own = torch.arange(len(captions))
    batch = Batch("text", None, own[:, None], own, own, own, captions=captions)
    made = Preparation((objective,), TOKENS, SIZES, 0, readers)(batch, "entry", 0)
    return {name.removeprefix("prefix_lm/"): tensor for name, tensor in made.items()}


def test_rows_are_as_in_blip_2_with_opt(opt_tokenizer: Path) -> None:
    readers = load_readers({"language": TextInput(str(opt_tokenizer), 7, 263)}, LetterTokenizer())
    tokenizer = readers["language"].tokenizer
    vocabulary = tokenizer.as_transformers(7).get_vocab()  # type: ignore[attr-defined]
    merged, line, c, d, blank = (vocabulary[word] for word in ("ab", "Ċ", "c", "d", "Ġ"))
    made = prepared(pickle.loads(pickle.dumps(readers)), PrefixLM(), ("abc", "ccccccccc"))
    assert made["token_ids"].tolist() == [[2, merged, c, line, 1, 1, 1], [2, c, c, c, c, c, line]]
    assert made["targets"].tolist() == [[merged, c, line, *[IGNORED] * 4], [c, c, c, c, c, line, IGNORED]]
    assert made["mask"].sum(1).tolist() == [4, 7]
    given = prepared(readers, PrefixLM(prompt="d"), ("abc",))
    assert given["token_ids"].tolist() == [[2, d, blank, merged, c, line, 1]]
    assert given["targets"].tolist() == [[IGNORED, blank, merged, c, line, IGNORED, IGNORED]]
    writing = PrefixLM(prompt="d").writing(TextReader(LetterTokenizer(), 6), readers)
    assert writing is not None
    assert (writing.given, writing.end, writing.max_length) == ((2, d), line, 5)
    assert writing.tokenizer.decode([merged, c, line, 1, 1]) == "abc"


def test_the_plans_tokenizer_is_read_with_where_the_stack_has_none() -> None:
    own = LetterTokenizer()
    assert load_readers({"language": TextInput(None, 7, 40)}, own)["language"] == TextReader(own, 7)


def test_without_a_language_model_nothing_is_written() -> None:
    assert PrefixLM().writing(TextReader(LetterTokenizer(), 6), {}) is None


def test_words_of_a_text_of_any_length() -> None:
    reader = TextReader(LetterTokenizer(), 5)
    assert reader.words("") == []
    assert reader.words("ab" * 20) == [6 + ord(letter) % 34 for letter in "ab" * 20]


def test_it_acts_where_there_is_a_text_behind_a_picture_or_by_itself() -> None:
    asked = {kind: PrefixLM().demands(kind, 4) for kind in DATA_KINDS}
    reads = {kind: sorted(demands.streams) for kind, demands in asked.items() if demands is not None}
    assert reads == {"image_text": ["language", "queries"], "video_text": ["language", "queries"], "text": ["language"]}
    labels = PrefixLM(include_labels=True)
    assert labels.demands("image_label", 4) is not None
    asking = [kind for kind in DATA_KINDS if labels.asks(kind, 1) is not None]
    assert asking == [*DATA_KINDS[:4], "image", "video"]
