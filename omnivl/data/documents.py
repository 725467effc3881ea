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
PICTURE_TOKEN, END_TOKEN = -1, -2
"""Their ids, counted from the end of a table of words with ``ADDED`` more rows, as Python counts: no tokenizer has
them, and what reads texts need not know how many rows the table has."""

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
        chosen, open_ = np.zeros(len(self.ids), dtype=np.bool_), False
        for place, token in enumerate(self.ids.tolist()):
            chosen[place] = open_ and token != PICTURE_TOKEN
            open_ = token == PICTURE_TOKEN or (open_ and token != END_TOKEN)
        return chosen


def read_document(text: str, reader: TextReader) -> Document:
    """The tokens of a text with marks; as many as there are.

    Args:
        text: With ``<image>`` and ``<EOC>``.
        reader: Of the words between them.
    """
    ids = [reader.tokenizer.special.cls]
    for part in _MARKS.split(text):
        ids += [_IDS[part]] if part in _IDS else reader.words(part) if part.strip() else []
    found = np.array(ids, dtype=np.int64)
    return Document(found, (found == PICTURE_TOKEN).cumsum())
