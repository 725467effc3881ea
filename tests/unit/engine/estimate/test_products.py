"""Times of products by their shape, worked out by hand on ten multiprocessors of 1 TFLOP/s each."""

import pytest

from engine.estimate.products import product_seconds


def _seconds(number: int, rows: int, columns: int, depth: int, *, bytes_per_second: float = 1e30) -> float:
    return product_seconds(
        number,
        rows,
        columns,
        depth,
        multiprocessors=10,
        flops_per_second=1e13,
        bytes_per_second=bytes_per_second,
    )


TILE = 2 * 256 * 128 * 256 / 1e12
"""Seconds of a tile of 256 x 128 with a depth of 256 on one multiprocessor."""


def test_a_full_round_takes_what_its_operations_take() -> None:
    assert _seconds(1, 2560, 128, 256) == pytest.approx(TILE)
    assert _seconds(1, 2 * 2560, 256, 256) == pytest.approx(4 * TILE)


def test_the_last_round_leaves_multiprocessors_idle() -> None:
    """Eleven tiles take two rounds; tiles half as large take three of 0.5 x 4 / 3 each, which is as long."""
    assert _seconds(1, 2816, 128, 256) == pytest.approx(2 * TILE)


def test_a_tile_that_is_not_full_takes_as_long() -> None:
    assert _seconds(1, 2560 - 100, 128 - 3, 256) == pytest.approx(TILE)


def test_a_small_result_takes_smaller_tiles_which_read_more() -> None:
    """An eighth of the operations, each number of the result with 1 / 32 operands instead of 3 / 256."""
    assert _seconds(1, 64, 64, 256) == pytest.approx(TILE / 8 * (1 / 32) / (3 / 256))


def test_products_that_are_computed_together_share_rounds() -> None:
    assert _seconds(10, 256, 128, 256) == pytest.approx(TILE)
    assert _seconds(11, 256, 128, 256) == pytest.approx(2 * TILE)


def test_a_deep_product_with_few_tiles_is_divided() -> None:
    """One tile of a depth of 8 x 512 in eight parts on as many multiprocessors, where their sum costs nothing."""
    assert _seconds(1, 256, 128, 4096) == pytest.approx(2 * TILE)
    # Writing and reading eight parts in fp32 would take 8 x 256 x 128 x 8 bytes: longer than the whole at 1 MB/s.
    assert _seconds(1, 256, 128, 4096, bytes_per_second=1e6) > 4 * TILE
    summed = 8 * 256 * 128 * 8 / 1e12
    assert _seconds(1, 256, 128, 4096, bytes_per_second=1e12) == pytest.approx(2 * TILE + summed)
