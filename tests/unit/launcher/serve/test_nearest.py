"""The nearest embeddings: exactly, in blocks; with FAISS nearly all of them."""

import numpy as np
import pytest

from launcher.serve import nearest
from launcher.serve.nearest import Exact, build_faiss, has_faiss, load_faiss

needs_faiss = pytest.mark.skipif(not has_faiss(), reason="needs faiss-cpu (the extra 'demo')")


def unit(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, as embeddings are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((40, size))
    found = centres[random.integers(0, 40, count)] + 0.5 * random.standard_normal((count, size))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_blocks_find_what_one_product_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, queries = unit(1000), unit(7, seed=1)
    products = queries @ embeddings.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :10]
    for block in (1000, 64, 3):
        monkeypatch.setattr(nearest, "_BLOCK", block)
        scores, rows = Exact(embeddings).search(queries, 10)
        assert np.array_equal(rows, order)
        assert np.allclose(scores, np.take_along_axis(products, order, 1), atol=1e-6)


def test_fewer_than_asked_for_and_equal_ones() -> None:
    same = np.repeat(unit(1), 5, axis=0)
    scores, rows = Exact(same).search(same[:1], 24)
    assert rows.tolist() == [[0, 1, 2, 3, 4]]
    assert np.allclose(scores, 1)


@needs_faiss
def test_faiss_finds_what_the_products_find() -> None:
    embeddings, queries = unit(5000), unit(100, seed=1)
    index = load_faiss(build_faiss(embeddings, queries))
    _, truth = Exact(embeddings).search(queries, 10)
    scores, rows = index.search(queries, 10)
    found = np.mean([len(np.intersect1d(one, other)) / 10 for one, other in zip(rows, truth, strict=True)])
    assert found >= 0.98
    assert np.all(np.diff(scores) <= 0)
    assert rows.dtype == np.int64
