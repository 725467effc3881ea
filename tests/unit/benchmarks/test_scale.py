"""What a micro-batch of ``base`` launches: it grows unnoticed otherwise, as no CPU's step shows it."""

from benchmarks.scale import MOST_CASTS, MOST_KERNELS, kernels_and_casts


def test_a_micro_batch_of_base_launches_few_kernels_and_casts() -> None:
    kernels, casts = kernels_and_casts()
    assert 0 < kernels <= MOST_KERNELS
    assert 0 < casts.total() <= MOST_CASTS
