"""Converts texts to token ids: WordPiece from a vocabulary file, or any tokenizer of a Hugging Face folder.

Shapes: B texts, L positions.
"""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from omnivl.data.emoji.unpack import VOCABULARY
from omnivl.data.small_files import check_small, read_small
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DECODE_TOKEN = "[DEC]"
_MAX_CACHED = 200_000
_MEBIBYTES = 256
_ASCII_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9 ]")


class Tokenizer(Protocol):
    """The interface of tokenizers for data, objectives and evaluation. Picklable."""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens and the size of the vocabulary."""

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 ``[B, length]``: ``[CLS] words [SEP]``, cut or padded to ``length``."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first ``[SEP]``, without special tokens."""

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """The same tokenizer as a class of ``transformers``, for texts of at most ``length`` tokens.

        Its ids are those of ``encode`` on any text, and ``load_tokenizer`` reads the folder that it saves.
        """


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Loads a tokenizer; nothing is fetched over a network.

    Args:
        name_or_path: ``emoji`` for the embedded vocabulary, a WordPiece ``vocab.txt`` (lower-case), or a folder (or
            cached name) of a Hugging Face tokenizer.

    Raises:
        DataError: There is no such tokenizer, or it lacks a token that the model needs.
    """
    path = VOCABULARY if name_or_path == "emoji" else Path(name_or_path)
    try:
        if path.is_dir():
            check_small(path, _MEBIBYTES)
    except OSError as error:
        at = error.filename or path
        raise DataError(f"tokenizer {name_or_path!r}: {at} cannot be read ({error.strerror}); name another") from error
    if path.suffix == ".txt":
        return WordPieceTokenizer.from_file(path)
    if path.is_dir() and not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        if (path / "vocab.txt").exists():
            return WordPieceTokenizer.from_file(path / "vocab.txt")
        raise DataError(f"tokenizer {name_or_path!r}: the folder has neither tokenizer.json nor vocab.txt")
    return HuggingFaceTokenizer.from_folder(name_or_path)


@dataclass(frozen=True)
class TextInput:
    """How a stack of a model reads texts, as its configuration says.

    Attributes:
        tokenizer: As ``load_tokenizer`` takes it; None: the plan's.
        length: Token positions per text.
        vocab_size: Rows of its word embedding.
    """

    tokenizer: str | None
    length: int
    vocab_size: int


@dataclass(frozen=True)
class TextReader:
    """A loaded tokenizer and the number of token positions per text. Picklable."""

    tokenizer: Tokenizer
    length: int

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """int64 ``[B, length]``: the start, the words, the end, cut or padded."""
        return self.tokenizer.encode(texts, self.length)

    def words(self, text: str) -> list[int]:
        """The ids of a text without start and end, as many as there are."""
        special, length = self.tokenizer.special, 8
        while True:
            ids: list[int] = self.tokenizer.encode([text], length)[0].tolist()
            end = 1 + ids[1:].index(special.sep)
            if end < length - 1:
                return ids[1:end]
            length *= 2


def load_readers(inputs: Mapping[str, TextInput], own: Tokenizer) -> dict[str, TextReader]:
    """What stacks with a tokenizer of their own read texts with, by stack.

    Args:
        inputs: By stack; see ``Architecture.text_inputs``.
        own: The plan's tokenizer.

    Raises:
        DataError: A stack has fewer words than its tokenizer, or see ``load_tokenizer``.
    """
    readers: dict[str, TextReader] = {}
    for stack, one in inputs.items():
        tokenizer = own if one.tokenizer is None else load_tokenizer(one.tokenizer)
        if (words := tokenizer.special.vocab_size) > one.vocab_size:
            raise DataError(
                f"model.{stack}.vocab_size: got {one.vocab_size} rows for a tokenizer of {words} words; allowed "
                f"{words} or more; raise it, or name another model.{stack}.tokenizer"
            )
        readers[stack] = TextReader(tokenizer, one.length)
    return readers


class _CachedEncoder(ABC):
    """Pads, and caches encoded texts, since captions and prompts occur again in every epoch."""

    special: SpecialTokens

    def __init__(self) -> None:
        self._cache: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": {}}

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 ``[B, length]``: ``[CLS] words [SEP]``, cut or padded to ``length``."""
        special = self.special
        result = np.full((len(texts), length), special.pad, dtype=np.int64)
        result[:, 0] = special.cls
        for row, text in enumerate(texts):
            words = self._cache.get(text)
            if words is None:
                words = self._words(text)
                if len(self._cache) < _MAX_CACHED:
                    self._cache[text] = words
            kept = min(len(words), length - 2)
            result[row, 1 : 1 + kept] = words[:kept]
            result[row, 1 + kept] = special.sep
        return result

    @abstractmethod
    def _words(self, text: str) -> list[int]:
        """The ids of a text, without ``[CLS]`` and ``[SEP]``."""

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        special = self.special
        skipped = {special.pad, special.cls, special.mask, special.decode}
        kept: list[int] = []
        for token in ids:
            if int(token) == special.sep:
                break
            if int(token) not in skipped:
                kept.append(int(token))
        return kept


class WordPieceTokenizer(_CachedEncoder):
    """BERT's lower-case WordPiece over a list of words."""

    def __init__(self, vocabulary: Sequence[str], source: str = "vocabulary") -> None:
        """Builds the pipeline.

        The start token of generation is ``[DEC]`` where the vocabulary has it; else the first unused slot
        (``[unused0]`` ...) takes its place, so that a BERT vocabulary keeps its size; else it is added at the end.

        Args:
            vocabulary: Words by id.
            source: For messages.

        Raises:
            DataError: A special token is missing or a word stands twice.
        """
        super().__init__()
        ids = {word: number for number, word in enumerate(vocabulary)}
        if len(ids) != len(vocabulary):
            double = next(word for number, word in enumerate(vocabulary) if ids[word] != number)
            raise DataError(f"tokenizer {source}: the word {double!r} stands twice; each word needs its own line")
        needed = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        missing = [token for token in needed if token not in ids]
        if missing:
            raise DataError(f"tokenizer {source}: {', '.join(missing)} missing; needed: {', '.join(needed)}")
        unused = [number for word, number in ids.items() if word.startswith("[unused")]
        decode = ids.get(DECODE_TOKEN)
        if decode is None:
            decode = unused[0] if unused else len(vocabulary)
        reserved = [ids[token] for token in needed] + unused + ([decode] if decode < len(vocabulary) else [])
        leading = [number for number in reserved if number < len(vocabulary) // 2 or len(vocabulary) < 100]
        self._vocabulary = list(vocabulary)
        self.special = SpecialTokens(
            pad=ids["[PAD]"],
            cls=ids["[CLS]"],
            sep=ids["[SEP]"],
            mask=ids["[MASK]"],
            decode=decode,
            vocab_size=max(len(vocabulary), decode + 1),
            num_reserved=max(leading, default=-1) + 1,
        )
        self._pipeline = _word_piece(ids)
        self._known: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: Path) -> "WordPieceTokenizer":
        """Reads a vocabulary file, one word per line.

        Raises:
            DataError: The file cannot be read, or see ``__init__``.
        """
        try:
            words = read_small(path, _MEBIBYTES).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer {path}: cannot be read as a vocabulary: {error}") from error
        while words and not words[-1]:
            words.pop()
        return cls(words, str(path))

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first ``[SEP]``, without special tokens."""
        kept = [token for token in self._until_end(ids) if token < len(self._vocabulary)]
        return str(self._pipeline.decode(kept, skip_special_tokens=False))

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """See ``Tokenizer``. There the start of generation is called ``[DEC]``, whatever its word here."""
        from transformers import PreTrainedTokenizerFast  # here, because it takes seconds to import

        words = [*self._vocabulary, DECODE_TOKEN][: self.special.vocab_size]
        words[self.special.decode] = DECODE_TOKEN
        pipeline = _word_piece({word: number for number, word in enumerate(words)})
        ends = [("[CLS]", self.special.cls), ("[SEP]", self.special.sep)]
        pipeline.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return PreTrainedTokenizerFast(
            tokenizer_object=pipeline,
            model_max_length=length,
            model_input_names=["input_ids", "attention_mask"],
            split_special_tokens=True,  # "[SEP]" in a text is three marks and a word, as it is here
            clean_up_tokenization_spaces=False,
            bos_token=DECODE_TOKEN,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        )

    def _words(self, text: str) -> list[int]:
        """Texts of printable ASCII are split here and their words looked up in a cache.

        The result equals that of the pipeline (lower case, split at blanks and at every mark), in a fifth of the time.
        """
        if not (text.isascii() and text.isprintable()):
            return self._pieces(text)
        ids: list[int] = []
        for word in _ASCII_WORD.findall(text.lower()):
            pieces = self._known.get(word)
            if pieces is None:
                pieces = self._pieces(word)
                if len(self._known) < _MAX_CACHED:
                    self._known[word] = pieces
            ids += pieces
        return ids

    def _pieces(self, text: str) -> list[int]:
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)


def _word_piece(ids: Mapping[str, int]) -> Pipeline:
    """BERT's lower-case pipeline over words by their ids."""
    pipeline = Pipeline(models.WordPiece(dict(ids), unk_token="[UNK]", max_input_chars_per_word=100))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return pipeline


class HuggingFaceTokenizer(_CachedEncoder):
    """Any tokenizer that ``transformers`` loads from a folder.

    ``[DEC]`` and a mask token are added at the end where they are missing, as in CLIP's. The end token may also be the
    padding, as there.
    """

    def __init__(self, tokenizer: Any, source: str = "tokenizer") -> None:
        """Wraps one that is loaded.

        Args:
            tokenizer: A ``PreTrainedTokenizerBase``; gets a ``[DEC]`` and a mask token.
            source: For messages.

        Raises:
            DataError: It lacks a token that the model needs.
        """
        super().__init__()
        if DECODE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [DECODE_TOKEN]})
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        found = {
            "pad": tokenizer.pad_token_id,
            "cls": tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id,
            "sep": tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id,
            "mask": tokenizer.mask_token_id,
        }
        missing = [name for name, token in found.items() if token is None]
        if missing:
            raise DataError(f"tokenizer {source!r}: no {', '.join(missing)} token; needed: pad, cls, sep")
        size = len(tokenizer)
        reserved = {*tokenizer.all_special_ids} | {
            number for word, number in tokenizer.get_vocab().items() if word.startswith("[unused")
        }
        self._tokenizer = tokenizer
        self.special = SpecialTokens(
            **found,
            decode=int(tokenizer.convert_tokens_to_ids(DECODE_TOKEN)),
            vocab_size=size,
            num_reserved=max((number for number in reserved if number < size // 2), default=-1) + 1,
        )

    @classmethod
    def from_folder(cls, name_or_path: str) -> "HuggingFaceTokenizer":
        """Loads one from a folder or by its cached name, without a network.

        Raises:
            DataError: There is no such tokenizer, or see ``__init__``.
        """
        from transformers import AutoTokenizer  # here, because it takes seconds to import

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"tokenizer {name_or_path!r} cannot be loaded: {reason}; allowed: 'emoji', a vocab.txt, or a folder "
                f"with a Hugging Face tokenizer"
            ) from error
        return cls(tokenizer, name_or_path)

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """See ``Tokenizer``; it adds its own special tokens, ``encode`` adds ours."""
        copied: PreTrainedTokenizerBase = copy.deepcopy(self._tokenizer)
        copied.model_max_length = length
        return copied

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first ``[SEP]``, without special tokens."""
        return str(self._tokenizer.decode(self._until_end(ids), skip_special_tokens=True)).strip()

    def _words(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
