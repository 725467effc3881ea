"""What tokenizers share: padding, a cache of encoded texts, and texts that no file can hold.

Shapes: B texts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from omnivl.data.special_tokens import SpecialTokens

DECODE_TOKEN = "[DEC]"
MAX_CACHED = 200_000
"""Texts, or words, that a tokenizer remembers."""

_BEGINNINGS = ("\u2581", "\u0120")
"""What the first piece of a word begins with in SentencePiece's vocabularies, and in byte-level ones as GPT-2's."""
_CONTINUES = "##"
"""What the other pieces begin with in BERT's vocabularies."""
_CLIP_END = "</w>"
"""What the last piece of a word ends with in CLIP's vocabulary."""


class CachedEncoder(ABC):
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
                words = self._words(_sound(text))
                if len(self._cache) < MAX_CACHED:
                    self._cache[text] = words
            kept = min(len(words), length - 2)
            result[row, 1 : 1 + kept] = words[:kept]
            result[row, 1 + kept] = special.sep
        return result

    def word_bounds(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """See ``Tokenizer``: by what a vocabulary's pieces begin or end with."""
        spelled = self._pieces_by_id()
        words = [word for word in spelled if word is not None]
        special = np.isin(np.arange(len(spelled)), [*self.special.roles.values()])
        if any(word.endswith(_CLIP_END) for word in words):
            return special, special | np.array([word is not None and word.endswith(_CLIP_END) for word in spelled])
        begins = np.ones(len(spelled), dtype=np.bool_)
        for mark in _BEGINNINGS:
            if any(word.startswith(mark) for word in words):
                begins = np.array([word is not None and word.startswith(mark) for word in spelled])
                break
        else:
            if any(word.startswith(_CONTINUES) for word in words):
                begins = np.array([word is None or not word.startswith(_CONTINUES) for word in spelled])
        return begins | special, special

    @abstractmethod
    def _pieces_by_id(self) -> list[str | None]:
        """The vocabulary as it is spelled, None where an id has no piece."""

    @abstractmethod
    def _words(self, text: str) -> list[int]:
        """The ids of a text, without ``[CLS]`` and ``[SEP]``."""

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        """The words before the first end, which is searched after the start: one token may be both."""
        special = self.special
        skipped = {special.pad, special.cls, special.mask, special.decode}
        kept: list[int] = []
        for token in ids[1:] if len(ids) and int(ids[0]) == special.cls else ids:
            if int(token) == special.sep:
                break
            if int(token) not in skipped:
                kept.append(int(token))
        return kept


def _sound(text: str) -> str:
    """The text as UTF-8 can hold it: halves of a surrogate pair are joined, single ones become U+FFFD.

    JSON spells a character beyond U+FFFF as two escapes, and lets one of them stand alone.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
