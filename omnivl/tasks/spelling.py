"""Texts in a form in which what a tokenizer has decoded can be compared with what people wrote."""

import re
import unicodedata

_IDEOGRAPHS = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+|[^\w\s]|_")


def comparable(text: str) -> str:
    """The words and marks of a text with one space between them, without case and accents.

    Tokenizers lower the case, take off accents, and put spaces around marks and ideographs; people do none of it
    consistently. ``"Don't: a Café"`` and ``"don ' t : a cafe"`` both become ``"don ' t : a cafe"``.
    """
    plain = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(letter for letter in plain if unicodedata.category(letter) != "Mn")
    return " ".join(_WORD.findall(unicodedata.normalize("NFC", bare)))
