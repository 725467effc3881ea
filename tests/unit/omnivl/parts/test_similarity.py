"""Similarities of samples with one embedding and with several."""

import torch

from omnivl.parts.similarity import similarity

# Two samples with two embeddings each, two with one.
MANY = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])
ONE = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])


def test_of_several_embeddings_the_most_alike_counts() -> None:
    # First sample: (0.8, 0.6) gives 0.8 and 0.6, (-0.6, 0.8) gives -0.6 and 0.8. Second: 0.96 and -0.8, 0.28 and 0.6.
    wanted = torch.tensor([[0.8, 0.8], [0.96, 0.6]])
    torch.testing.assert_close(similarity(MANY, ONE), wanted)
    torch.testing.assert_close(similarity(ONE, MANY), wanted.t())


def test_samples_that_both_have_several_are_compared_by_the_most_alike_pair() -> None:
    # Of (1, 0), (0, 1) and (0.6, 0.8), (-1, 0) the most alike are (0, 1) and (0.6, 0.8).
    torch.testing.assert_close(similarity(MANY, MANY), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))


def test_single_embeddings_are_compared_by_one_product() -> None:
    left, right = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(similarity(left, right), left @ right.t())
