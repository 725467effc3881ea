"""Similarities of samples with one embedding and with several."""

import torch
import torch.nn.functional as F

from omnivl.parts.similarity import similarity, unit_length

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


def test_unit_length_is_what_torch_normalises_to() -> None:
    """Values to the bit, gradients in fp64; of nothing as well."""
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64) * torch.logspace(-6, 6, 7, dtype=torch.float64)[:, None]
    x[3] = 0.0
    pull, found = torch.randn(7, 5, dtype=torch.float64), []
    for normalise in (unit_length, lambda own: F.normalize(own, dim=-1)):
        own = x.clone().requires_grad_(True)
        made = normalise(own)
        found.append((made, *torch.autograd.grad((made * pull).sum(), own)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)
    assert torch.equal(unit_length(x.float()), F.normalize(x.float(), dim=-1))
