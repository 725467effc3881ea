import numpy as np
import pytest

from omnivl.architectures import OmniVL
from omnivl.data.balance import shares, visual_work
from omnivl.data.sizes import InputSizes
from omnivl.parts.sizes import Patches
from omnivl.parts.vit import DividedBlock

SIZES = InputSizes(224, 112, 8, 16, 1, text_length=8, native=True, visual_width=768)


def test_shares_by_hand():
    # 9 and 8 go apart, 5 to the lighter one and 4 to the other; of the last two one goes to each.
    assert shares(np.array([1.0, 9.0, 5.0, 8.0, 4.0, 1.0]), 2).tolist() == [[0, 1, 4], [2, 3, 5]]
    assert shares(np.ones(6), 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    # The heavy one fills no replica: all get two.
    assert shares(np.array([9.0, 1.0, 1.0, 1.0]), 2).tolist() == [[0, 3], [1, 2]]
    assert shares(np.arange(4.0), 1).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("replicas", "each"), [(4, 8), (4, 16), (64, 32)])
def test_shares_are_equal_in_number_and_nearly_in_work(replicas, each):
    random = np.random.default_rng(replicas)
    pictures = np.exp(random.normal(5, 0.5, (replicas * each, 2))).astype(np.int64) + 16
    work = visual_work(SIZES, False, pictures)
    found = shares(work, replicas)
    assert found.shape == (replicas, each)
    assert sorted(found.flatten().tolist()) == list(range(replicas * each))
    assert all(row == sorted(row) for row in found.tolist())
    total = work[found].sum(axis=1)
    assert total.max() / total.mean() < 1.02
    in_order = work.reshape(replicas, each).sum(axis=1)
    assert in_order.max() / in_order.mean() > 1.1


@pytest.mark.parametrize("clips", [False, True])
def test_work_is_that_of_a_block(clips):
    """In proportion to the operations of blocks, but for what a clip's attention over time takes."""
    model = OmniVL(sizes="native")
    patches = Patches(224, 112, 32, 16, 1, native=True)
    block = DividedBlock(model.stacks["visual"], patches, 0)
    pictures = np.array([[224, 224], [64, 64], [160, 400]])
    work = visual_work(model.inputs, clips, pictures)
    counts = model.inputs.grids(clips, pictures).prod(axis=1).tolist()
    times = 32 if clips else 1
    exact = np.array([block.flops(times, count, is_video=False, first_only=False) for count in counts])
    np.testing.assert_allclose(work / work[0], exact / exact[0], rtol=0.03)
