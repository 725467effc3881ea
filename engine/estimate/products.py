"""How long an accelerator takes for a matrix product of a shape: its multiprocessors compute the result tile by tile.

A result that is no multiple of a tile computes more than it needs, and the last round of tiles leaves multiprocessors
idle (tile and wave quantization). A smaller tile reads its operands more often for as many operations. Where a result
has few tiles, its depth is divided: the parts are written in fp32, read again and summed.

Source: NVIDIA, Matrix Multiplication Background User's Guide, dimension quantization effects; CUTLASS, efficient GEMM,
parallelized reductions (split-K).
"""

import math
from collections.abc import Iterator
from functools import lru_cache

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Rows and columns of a result that a multiprocessor computes at a time, as libraries have them."""

_LEAST_DEPTH = 512
"""Of a part of a divided product: below it a tile's start and end outweigh its sums."""

_PART_BYTES = 8
"""Of each number of a part: written and read in fp32."""


@lru_cache(maxsize=65536)
def product_seconds(
    number: int,
    rows: int,
    columns: int,
    depth: int,
    *,
    multiprocessors: int,
    flops_per_second: float,
    bytes_per_second: float,
) -> float:
    """The time of the fastest tile and division of the depth.

    Args:
        number: Of equal products that are computed together.
        rows: Of the result.
        columns: Of the result.
        depth: Of the dimension that is summed.
        multiprocessors: That compute at the same time.
        flops_per_second: All together, on full tiles of the largest size.
        bytes_per_second: Of the memory.
    """
    each = flops_per_second / multiprocessors
    best = math.inf
    for tall, wide in TILES:
        tiles = number * math.ceil(rows / tall) * math.ceil(columns / wide)
        flops = 2.0 * tall * wide * _operands(tall, wide) / _operands(*TILES[0])
        for parts in _divisions(depth):
            rounds = math.ceil(tiles * parts / multiprocessors)
            summed = number * rows * columns * parts * _PART_BYTES if parts > 1 else 0
            best = min(best, rounds * flops * math.ceil(depth / parts) / each + summed / bytes_per_second)
    return best


def _operands(tall: int, wide: int) -> float:
    """Numbers that a tile reads for each number of its result and each step of the depth."""
    return (tall + wide) / (tall * wide)


def _divisions(depth: int) -> Iterator[int]:
    parts = 1
    while parts == 1 or depth >= parts * _LEAST_DEPTH:
        yield parts
        parts *= 2
