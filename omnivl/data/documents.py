"""Texts with places of pictures: ``<image>`` where one stands, ``<EOC>`` where what is said of it ends.

Shapes: L token positions.

Source: Alayrac et al., Flamingo, arXiv 2204.14198, section 3.1.3; Awadalla et al., OpenFlamingo, arXiv 2308.01390, and
    its code (the end is called ``<|endofchunk|>`` there).
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omnivl.data.tokenizer import TextReader

PICTURE, END = "<image>", "<EOC>"
"""The marks in a text."""

ADDED = 2
"""Rows of the marks."""

PICTURE_TOKEN, END_TOKEN = -1, -2
"""Ids of the marks, which no tokenizer has: rows of a table of words with ``ADDED`` more, counted from its end, so that
who reads texts need not know the number of words."""

_MARKS = re.compile(f"({PICTURE}|{END})")
_IDS = {PICTURE: PICTURE_TOKEN, END: END_TOKEN}


@dataclass(frozen=True)
class Document:
    """A document as a language model reads it: the start token, then words and marks.

    Attributes:
        ids: int64 ``[L]``, without padding.
        pictures: int64 ``[L]``, how many pictures stand before each token or at it.
    """

    ids: NDArray[np.int64]
    pictures: NDArray[np.int64]

    @property
    def said(self) -> NDArray[np.bool_]:
        """Which tokens are said of a picture, its end included, bool ``[L]``: those that a loss predicts."""
        found, within = np.zeros(len(self.ids), dtype=np.bool_), False
        for place, token in enumerate(self.ids.tolist()):
            found[place] = within and token != PICTURE_TOKEN
            within = token == PICTURE_TOKEN or (within and token != END_TOKEN)
        return found


def read_document(text: str, reader: TextReader) -> Document:
    """The tokens of a text with marks, however long it is.

    Args:
        text: With ``<image>`` and ``<EOC>``.
        reader: Reads the words between them.
    """
    ids = [reader.tokenizer.special.cls]
    for part in _MARKS.split(text):
        if part in _IDS:
            ids.append(_IDS[part])
        elif part.strip():
            ids += reader.words(part)
    found = np.array(ids, dtype=np.int64)
    return Document(found, (found == PICTURE_TOKEN).cumsum())
