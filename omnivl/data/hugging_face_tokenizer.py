"""Tokenizers of Hugging Face folders, checked for what ``omnivl.data.tokenizer.Tokenizer`` says."""

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import processors

from omnivl.data.cached_encoder import DECODE_TOKEN, CachedEncoder
from omnivl.data.plain_files import check_plain_file
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".spm", ".tiktoken"})
_UNLIKELY = ("\ue000", "\U000f0001", "\ufffd", "ꙮ ᚠ")
"""Texts that hardly any vocabulary has words for."""
_USUAL = ("", " ", "A red heart, 2 hearts.", "naïve café", "日本", "\U0001f600", "a\nb\tc\x00")


class HuggingFaceTokenizer(CachedEncoder):
    """Any tokenizer that ``transformers`` loads from a folder.

    ``[DEC]`` and a mask token are added at the end where they are missing, as in CLIP's. Control tokens in a text are
    text; where the vocabulary has one as an ordinary word, its spelling is cut in two.
    """

    def __init__(self, tokenizer: Any, source: str = "tokenizer") -> None:
        """Wraps one that is loaded.

        Args:
            tokenizer: A ``PreTrainedTokenizerBase``; gets a ``[DEC]`` and a mask token, and takes special tokens in
                texts for text from now on.
            source: For messages.

        Raises:
            DataError: It is not as ``omnivl.data.tokenizer.Tokenizer`` says.
        """
        super().__init__()
        if DECODE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [DECODE_TOKEN]})
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        tokenizer.split_special_tokens = True
        found = {
            "pad": tokenizer.pad_token_id,
            "cls": tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id,
            "sep": tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id,
            "mask": tokenizer.mask_token_id,
        }
        missing = [name for name, token in found.items() if token is None]
        if missing:
            raise DataError(f"tokenizer {source!r}: no {', '.join(missing)} token; needed: pad, cls, sep")
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        size = 1 + max(vocabulary.values())  # some vocabularies have holes
        reserved = {*tokenizer.all_special_ids} | {
            number for word, number in vocabulary.items() if word.startswith("[unused")
        }
        self._tokenizer = tokenizer
        self.special = SpecialTokens(
            **found,
            decode=int(tokenizer.convert_tokens_to_ids(DECODE_TOKEN)),
            vocab_size=size,
            num_reserved=max((number for number in reserved if number < size // 2), default=-1) + 1,
        )
        self.special.check(source)
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in self.special.roles.values() else unknown
        control = {*map(int, tokenizer.all_special_ids), *self.special.roles.values()} - {self._unknown}
        self._control = frozenset(control)
        spelled = sorted((word for word, number in vocabulary.items() if number in control), key=len, reverse=True)
        self._spellings = re.compile("|".join(map(re.escape, spelled)))
        self._check(source, spelled)

    @classmethod
    def from_folder(cls, name_or_path: str) -> "HuggingFaceTokenizer":
        """Loads one from a folder or by its cached name, without a network, and without code that lies in it.

        Raises:
            DataError: There is no such tokenizer, or see ``__init__``.
        """
        from transformers import AutoTokenizer  # here, because it takes seconds to import

        try:
            _check_files(Path(name_or_path))
            tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each format raises other errors; all mean that there is no such tokenizer
            reason = " ".join(str(error).split())
            if not os.path.exists(name_or_path):  # noqa: PTH110 - Path.exists raises for a name that is too long
                reason = f"there is no folder of that name in {Path.cwd()}, nor a cached tokenizer"
            if "trust_remote_code" in reason:  # an advice that leads nowhere
                reason = "its class is code that lies in the folder, and such code is not run"
            raise DataError(
                f"tokenizer {name_or_path!r} cannot be loaded: {reason}; allowed: 'emoji', a vocab.txt, or a folder "
                f"with a Hugging Face tokenizer"
            ) from error
        return cls(tokenizer, name_or_path)

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """See ``Tokenizer``; one that puts other tokens than ours at the start and the end gets ours."""
        copied: Any = copy.deepcopy(self._tokenizer)
        copied.model_max_length = length
        copied.padding_side = copied.truncation_side = "right"
        text, special = "a red heart", self.special
        backend = getattr(copied, "backend_tokenizer", None)
        if backend is not None and copied(text)["input_ids"] != [special.cls, *self._pieces(text), special.sep]:
            start, end = copied.convert_ids_to_tokens([special.cls, special.sep])
            backend.post_processor = processors.TemplateProcessing(
                single=[start, "$A", end],
                special_tokens=[(start, special.cls), (end, special.sep)],
            )
        result: PreTrainedTokenizerBase = copied
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first ``[SEP]``, without special tokens."""
        return str(self._tokenizer.decode(self._until_end(ids), skip_special_tokens=True)).strip()

    def _pieces_by_id(self) -> list[str | None]:
        spelled: list[str | None] = [None] * self.special.vocab_size
        for word, number in self._tokenizer.get_vocab().items():
            spelled[number] = word
        return spelled

    def _words(self, text: str) -> list[int]:
        ids = self._pieces(text)
        if self._control.isdisjoint(ids):
            return ids
        # The vocabulary has a control token as an ordinary word, and the text spells it.
        cut = self._spellings.sub(lambda match: f"{match[0][:1]}\0{match[0][1:]}", text.replace("\0", " "))
        pieces = [piece for part in cut.split("\0") for piece in self._pieces(part)]
        own = [self._unknown if piece in self._control else piece for piece in pieces]
        return [piece for piece in own if piece is not None]

    def _pieces(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def _check(self, source: str, spelled: Sequence[str]) -> None:
        """Encodes some texts, to see that the tokenizer is as it should be.

        Raises:
            DataError: It is not.
        """
        model = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "model", None)
        if chance := getattr(model, "dropout", None):
            raise DataError(
                f"tokenizer {source!r}: got dropout {chance:g}, by which a text has other ids each time; allowed is "
                "none; set model.dropout to null in its tokenizer.json"
            )
        for text in (*_USUAL, *_UNLIKELY, *(f"a {word} b{word}" for word in spelled)):
            try:
                pieces, ids = self._pieces(text), self._words(text)
            except Exception as error:  # each tokenizer raises other errors; all mean that it cannot read the text
                raise DataError(
                    f"tokenizer {source!r}: cannot encode {text!r} ({error}); allowed is a tokenizer of any text; give "
                    "it an unknown token that its vocabulary has"
                ) from error
            if text in _UNLIKELY and not self._control.isdisjoint(pieces):
                made = self._tokenizer.convert_ids_to_tokens(pieces)
                raise DataError(
                    f"tokenizer {source!r}: got unknown words as {made}, which "
                    "are control tokens; allowed is an unknown token of its own; give it one"
                )
            if any(not 0 <= token < self.special.vocab_size for token in ids):
                raise DataError(
                    f"tokenizer {source!r}: got ids {ids} for {text!r}; allowed are 0 to "
                    f"{self.special.vocab_size - 1}, those of its vocabulary; use another tokenizer"
                )


def _check_files(folder: Path) -> None:
    """Refuses a folder with a file that cannot be read whole.

    Raises:
        DataError: See ``check_plain_file``.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix in _TEXT_SUFFIXES and not file.is_dir():
            check_plain_file(file)
