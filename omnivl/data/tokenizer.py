"""Converts texts to token ids: WordPiece from a vocabulary file, or any tokenizer of a Hugging Face folder.

Shapes: B texts, L positions.
"""

import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from omnivl.data.emoji.unpack import VOCABULARY
from omnivl.data.hugging_face_tokenizer import HuggingFaceTokenizer
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.word_piece import WordPieceTokenizer
from omnivl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer(Protocol):
    """The interface of tokenizers for data, objectives and evaluation. Picklable.

    What the rest of the package relies on; ``load_tokenizer`` checks all of it and refuses by name:

    - There are tokens for padding, start, end, masking and the start of generation, with ids below
      ``special.vocab_size``, as all ids are. Masking and the start of generation are tokens of their own.
    - Padding is not the start. It is the end only with architectures that find the end otherwise (CLIP); start and end
      may be one token, except with those. ``build_chain`` checks both (``Architecture.token_misfits``).
    - No text makes one of these tokens: ``[SEP]`` in a caption is text, and an unknown word is not one of them.
    - A text gives the same ids each time, whatever texts came before.
    - Every ``str`` can be encoded, the empty one and one with half a surrogate pair too.
    - Its files are plain files of bounded size, and run no code.
    """

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special tokens and the size of the vocabulary."""

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 ``[B, length]``: ``[CLS] words [SEP]``, cut or padded to ``length``."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first ``[SEP]``, without special tokens."""

    def word_bounds(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which tokens begin a word, and which end one, by their ids, bool ``[vocab_size]`` each.

        A token belongs to the word of the token before it where it does not begin one and that does not end one.
        Special tokens do both.
        """

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
    if path.suffix == ".txt":
        return WordPieceTokenizer.from_file(path)
    mode = _mode(path)
    if mode and not stat.S_ISDIR(mode):
        raise DataError(
            f"tokenizer {name_or_path!r}: got a file; allowed: 'emoji', a vocab.txt, or a folder with a Hugging Face "
            "tokenizer; name its folder"
        )
    if mode and not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        if (path / "vocab.txt").exists():
            return WordPieceTokenizer.from_file(path / "vocab.txt")
        raise DataError(f"tokenizer {name_or_path!r}: the folder has neither tokenizer.json nor vocab.txt")
    return HuggingFaceTokenizer.from_folder(name_or_path)


def _mode(path: Path) -> int:
    """What a path is, as ``stat`` has it; 0 where there is nothing, or no such name can be."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


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

    def fits(self, text: str) -> bool:
        """Whether ``encode`` cuts nothing of a text."""
        ids: list[int] = self.tokenizer.encode([text], self.length + 1)[0].tolist()  # a cut text ends at the last place
        return ids.index(self.tokenizer.special.sep, 1) < self.length

    def words(self, text: str) -> list[int]:
        """The ids of a text without start and end, as many as there are."""
        special, length = self.tokenizer.special, 8
        while True:
            ids: list[int] = self.tokenizer.encode([text], length)[0].tolist()
            end = 1 + ids[1:].index(special.sep)
            if end < length - 1:
                return ids[1:end]
            length *= 2


def batch_readers(
    inputs: Mapping[str, TextInput], own: Tokenizer, length: int, load: Callable[[str, int], Tokenizer] | None = None
) -> dict[str, TextReader]:
    """What the objectives of a stage read texts with: ``load_readers``, and as ``text`` the plan's tokenizer.

    Args:
        inputs: As for ``load_readers``, as are ``own`` and ``load``.
        own: The plan's tokenizer.
        length: Token positions of the model's texts.
        load: Of a name and the number of words.

    Raises:
        DataError: See ``load_readers``.
    """
    return {"text": TextReader(own, length), **load_readers(inputs, own, load)}


def load_readers(
    inputs: Mapping[str, TextInput], own: Tokenizer, load: Callable[[str, int], Tokenizer] | None = None
) -> dict[str, TextReader]:
    """What stacks with a tokenizer of their own read texts with, by stack.

    Args:
        inputs: By stack; see ``Architecture.text_inputs``.
        own: The plan's tokenizer.
        load: Of a name and the number of words that the model has for it; None for ``load_tokenizer``.

    Raises:
        DataError: A stack has fewer words than its tokenizer, or see ``load_tokenizer``.
    """
    readers: dict[str, TextReader] = {}
    for stack, one in inputs.items():
        tokenizer = own
        if one.tokenizer is not None:
            tokenizer = load_tokenizer(one.tokenizer) if load is None else load(one.tokenizer, one.vocab_size)
        if (words := tokenizer.special.vocab_size) > one.vocab_size:
            raise DataError(
                f"model.{stack}.vocab_size: got {one.vocab_size} rows for a tokenizer of {words} words; allowed "
                f"{words} or more; raise it, or name another model.{stack}.tokenizer"
            )
        readers[stack] = TextReader(tokenizer, one.length)
    return readers
