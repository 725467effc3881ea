"""BERT's lower-case WordPiece from a vocabulary file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from omnivl.data.cached_encoder import DECODE_TOKEN, MAX_CACHED, CachedEncoder
from omnivl.data.plain_files import read_plain_text, text_lines
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import DataError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASCII_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9 ]")


class WordPieceTokenizer(CachedEncoder):
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
        """Reads a vocabulary file, one word per line; see ``text_lines`` for what ends a line.

        Raises:
            DataError: The file cannot be read, or see ``__init__``.
        """
        try:
            words = text_lines(read_plain_text(path, encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, DataError) as error:
            raise DataError(
                f"tokenizer {path}: cannot be read as a vocabulary: {reason_of(error)}; name a text file with one word "
                "per line"
            ) from error
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

    def _pieces_by_id(self) -> list[str | None]:
        return [*self._vocabulary, *[None] * (self.special.vocab_size - len(self._vocabulary))]

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
                if len(self._known) < MAX_CACHED:
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
