"""The nearest of many embeddings: exactly, by matrix products, or by FAISS where it is installed and they are many.

Shapes: N embeddings, D their size, Q queries, K results. All embeddings have unit length; their product is the cosine.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]
Numbers = NDArray[np.int64]

MANY = 50_000
"""From how many embeddings on FAISS is used. Below, a product takes no more than some milliseconds and is exact."""

_BLOCK = 65_536
_CHECKED, _TOP, _ENOUGH = 200, 10, 0.98
_TRAINED_PER_CELL = 64


class Nearest(Protocol):
    """Finds the nearest embeddings of queries."""

    def search(self, queries: Embeddings, top: int) -> tuple[Embeddings, Numbers]:
        """Falling cosines ``[Q, K]`` and their rows ``[Q, K]``; K is ``top``, or N where that is less."""


class Exact:
    """All products, block by block, so that the memory does not grow with their number."""

    def __init__(self, embeddings: Embeddings) -> None:
        """Keeps ``[N, D]``."""
        self._embeddings = embeddings

    def search(self, queries: Embeddings, top: int) -> tuple[Embeddings, Numbers]:
        """See ``Nearest``. Of equal cosines the first row comes first."""
        top = min(top, len(self._embeddings))
        scores = np.empty((len(queries), 0), dtype=np.float32)
        rows = np.empty((len(queries), 0), dtype=np.int64)
        for first in range(0, len(self._embeddings), _BLOCK):
            block = queries @ self._embeddings[first : first + _BLOCK].T
            numbers = np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)
            scores, rows = np.concatenate([scores, block], axis=1), np.concatenate([rows, numbers], axis=1)
            if scores.shape[1] > top:
                kept = np.argpartition(-scores, top - 1, axis=1)[:, :top]
                scores, rows = np.take_along_axis(scores, kept, 1), np.take_along_axis(rows, kept, 1)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class Faiss:
    """FAISS's inverted lists: cells by k-means, of which those nearest to a query are searched exactly."""

    def __init__(self, index: Any) -> None:
        """Takes a filled index of FAISS."""
        self._index = index

    def search(self, queries: Embeddings, top: int) -> tuple[Embeddings, Numbers]:
        """See ``Nearest``; what lies in cells that are not searched is not found."""
        scores, rows = self._index.search(np.ascontiguousarray(queries), min(top, self._index.ntotal))
        found = rows >= 0
        return np.where(found, scores, -1).astype(np.float32), rows.astype(np.int64)


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return find_spec("faiss") is not None


def build_faiss(embeddings: Embeddings, queries: Embeddings) -> NDArray[np.uint8]:
    """An index of FAISS as bytes, with as many cells searched as the queries need.

    Cells searched are doubled until 98 % of the queries' ten nearest are found. Source: Johnson et al., "Billion-scale
    similarity search with GPUs" (arXiv 1702.08734), section 2, IVFFlat.

    Args:
        embeddings: ``[N, D]``.
        queries: ``[Q, D]``, such as people will ask: texts lie elsewhere than pictures.
    """
    faiss = import_module("faiss")
    cells = max(1, round(4 * len(embeddings) ** 0.5 / 8) * 8)
    coarse = faiss.IndexFlatIP(embeddings.shape[1])
    index = faiss.IndexIVFFlat(coarse, embeddings.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    step = max(1, len(embeddings) // (_TRAINED_PER_CELL * cells))
    index.cp.seed = 0
    index.train(np.ascontiguousarray(embeddings[::step]))
    index.add(np.ascontiguousarray(embeddings))
    asked = queries[:: max(1, len(queries) // _CHECKED)][:_CHECKED]
    _, truth = Exact(embeddings).search(asked, _TOP)
    index.nprobe = 1
    while index.nprobe < cells:
        _, found = index.search(np.ascontiguousarray(asked), truth.shape[1])
        hits = sum(len(np.intersect1d(one, other)) for one, other in zip(found, truth, strict=True))
        if hits >= _ENOUGH * truth.size:
            break
        index.nprobe = min(cells, 2 * index.nprobe)
    stored: NDArray[np.uint8] = faiss.serialize_index(index)
    return stored


def load_faiss(stored: NDArray[np.uint8]) -> Faiss:
    """The index that ``build_faiss`` made. Only of bytes that are the user's own: FAISS trusts what it reads."""
    return Faiss(import_module("faiss").deserialize_index(stored))
