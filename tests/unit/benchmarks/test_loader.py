"""The bare loop and the loader make the same pictures: they are compared on equal results."""

import numpy as np
import pytest

from benchmarks.loader import Case, bare_loop, cases_of, loader_of, measure


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return cases_of(tmp_path_factory.mktemp("photos"), quick=True)


@pytest.mark.parametrize("number", range(3))
def test_the_last_batch_is_the_same(cases, number):
    case = cases[number]
    views = bare_loop(case)()
    with loader_of(case, workers=0) as loader:
        batches = iter(loader)
        for _ in range(case.batches + 1):
            batch, _ = next(batches)
    assert set(batch.position.tolist()) == set(case.timed[-case.micro_batch_size :])
    assert batch.prepared  # the loader also drew what the objectives need
    np.testing.assert_array_equal(batch.frames.numpy(), np.stack(views).transpose(0, 1, 4, 2, 3))


def test_photographs_decoded_at_the_scale_of_their_crops_look_the_same(cases):
    case = cases[3]
    views = np.stack(bare_loop(case)()).transpose(0, 1, 4, 2, 3).astype(int)
    with loader_of(case, workers=0) as loader:
        batches = iter(loader)
        for _ in range(case.batches + 1):
            batch, _ = next(batches)
    difference = np.abs(batch.frames.numpy() - views)
    assert 0 < difference.mean() < 2


def test_all_contenders_are_timed(cases):
    seconds = measure(cases[1], rounds=1)
    assert set(seconds) == {"bare loop", "0 workers", "1 worker"}
    assert all(value > 0 for (value,) in seconds.values())
