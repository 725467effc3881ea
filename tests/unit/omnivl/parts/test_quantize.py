"""Quantizers: by hand, and the vector quantizer against transformers' class."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.chain.gather import LocalGather
from omnivl.parts.quantize import LookupFree, NearestCode, VectorQuantizer, perplexity

TWO = VectorQuantizer(num_codes=2, size=2, decay=0.75, restart_after=0)
VECTORS = [[1.0, 0.0], [2.0, 4.0], [3.0, 5.0]]


def quantizer(config: VectorQuantizer) -> NearestCode:
    made = config.build()
    assert isinstance(made, NearestCode)
    codes = torch.tensor([[0.0, 0.0], [2.0, 5.0]])
    with torch.no_grad():
        made.codebook.copy_(codes)
        if config.update == "ema":
            made.sums.copy_(codes)
    return made


def test_a_vector_takes_the_nearest_code_and_its_gradient_passes_through() -> None:
    vectors = torch.tensor(VECTORS, requires_grad=True)
    quantized, codes, loss = quantizer(TWO)(vectors, LocalGather())
    assert codes.tolist() == [0, 1, 1]
    assert quantized.tolist() == [[0.0, 0.0], [2.0, 5.0], [2.0, 5.0]]
    # Squared distances 1, 1 and 1 over six values, times the commitment of 0.25.
    torch.testing.assert_close(loss, torch.tensor(0.25 * 3 / 6))
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (gradient,) = torch.autograd.grad((quantized * upstream).sum(), vectors, retain_graph=True)
    assert torch.equal(gradient, upstream)
    (gradient,) = torch.autograd.grad(loss, vectors)
    # 0.25 * 2 (v - c) / 6
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0]]) / 12)


def test_codes_with_gradient_are_drawn_to_their_vectors() -> None:
    made = quantizer(replace(TWO, update="gradient"))
    _, _, loss = made(torch.tensor(VECTORS), LocalGather())
    torch.testing.assert_close(loss, torch.tensor(1.25 * 3 / 6))
    (gradient,) = torch.autograd.grad(loss, made.codebook)
    # 2 (c - v) / 6: (-1, 0) of the first code; (0, 1) and (-1, 0) of the second.
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.0], [-1.0, 1.0]]) / 3)


def test_moving_means_follow_the_vectors_of_a_step() -> None:
    made = quantizer(TWO)
    for vector in VECTORS:  # micro-batches of one step
        made(torch.tensor([vector]), LocalGather())
    made.after_step(LocalGather())
    # Uses 0.75 * 1 + 0.25 * (1, 2); sums 0.75 * c + 0.25 * ((1, 0), (5, 9)).
    torch.testing.assert_close(made.uses, torch.tensor([1.0, 1.25]))
    torch.testing.assert_close(made.codebook, torch.tensor([[0.25, 0.0], [2.75 / 1.25, 6.0 / 1.25]]))
    before = made.codebook.clone()
    made.after_step(LocalGather())
    assert torch.equal(made.codebook, before), "a step without vectors moves nothing"


def test_a_skipped_step_and_an_evaluation_move_nothing() -> None:
    made = quantizer(TWO)
    before = made.codebook.clone()
    made(torch.tensor(VECTORS), LocalGather())
    made.discard_step()
    made.eval()(torch.tensor(VECTORS), LocalGather())
    made.after_step(LocalGather())
    assert torch.equal(made.codebook, before)


def test_an_unused_code_stays_until_it_is_due_and_then_takes_a_vector_s_place() -> None:
    made = quantizer(replace(TWO, restart_after=3))
    made.steps += 1  # not the first step
    for step in range(3):
        made(torch.tensor([[0.0, 1.0]]), LocalGather())
        made.after_step(LocalGather())
        assert made.codebook[1].tolist() == ([2.0, 5.0] if step < 2 else [0.0, 1.0])
    assert (made.uses[1], made.unused[1]) == (1.0, 0)
    torch.testing.assert_close(made.sums[1], torch.tensor([0.0, 1.0]))


def test_a_code_that_is_used_now_and_then_is_not_restarted() -> None:
    made = quantizer(replace(TWO, restart_after=2))
    made.steps += 1
    for vector in ([0.0, 1.0], [2.0, 5.0], [0.0, 1.0], [2.0, 5.0]):
        made(torch.tensor([vector]), LocalGather())
        made.after_step(LocalGather())
    assert made.codebook[1].tolist() == [2.0, 5.0]


def test_codes_start_as_vectors_of_the_first_step() -> None:
    torch.manual_seed(0)
    made = VectorQuantizer(num_codes=4, size=2).build()
    assert isinstance(made, NearestCode)
    vectors = 50.0 + torch.randn(6, 2)  # far from all drawn codes
    for part in vectors.split(3):
        made(part, LocalGather())
    made.after_step(LocalGather())
    started = {tuple(code) for code in made.codebook.tolist()}
    assert len(started) == 4
    assert started <= {tuple(vector) for vector in vectors.tolist()}
    assert torch.equal(made.sums, made.codebook)
    assert made.uses.tolist() == [1.0] * 4
    made(vectors, LocalGather())
    made.after_step(LocalGather())
    # The second step moves them: 4 uses and 6 vectors, with a decay of 0.99.
    torch.testing.assert_close(made.uses.sum(), torch.tensor(0.99 * 4 + 0.01 * 6))


def test_more_codes_than_vectors_start_over_several_steps() -> None:
    made = VectorQuantizer(num_codes=4, size=2, restart_after=1).build()
    assert isinstance(made, NearestCode)
    for most in (3, 4):
        made(torch.tensor([[50.0, 1.0], [60.0, 2.0], [70.0, 3.0]]), LocalGather())
        made.after_step(LocalGather())
        assert int((made.codebook[:, 0] > 40.0).sum()) == most


def test_signs_are_bits_and_uncertain_bits_cost() -> None:
    config = LookupFree(size=3, commitment=0.0, entropy=1.0)
    vectors = torch.tensor([[0.5, -1.0, 2.0], [-0.1, 0.0, 3.0]], requires_grad=True)
    quantized, codes, loss = config.build()(vectors, LocalGather())
    assert quantized.tolist() == [[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]
    assert codes.tolist() == [0b101, 0b100]
    assert config.num_codes == 8

    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    set_ = [[1 / (1 + math.exp(-4 * value)) for value in row] for row in vectors.tolist()]
    certain = sum(entropy(p) for row in set_ for p in row) / 2
    varied = sum(entropy((a + b) / 2) for a, b in zip(*set_, strict=True))
    torch.testing.assert_close(loss, torch.tensor(certain - varied))
    (gradient,) = torch.autograd.grad(quantized.sum(), vectors)
    assert torch.equal(gradient, torch.ones(2, 3))


def test_perplexity_counts_codes_that_are_used_alike() -> None:
    torch.testing.assert_close(perplexity(torch.tensor([0, 0, 3, 3]), 8), torch.tensor(2.0))
    torch.testing.assert_close(perplexity(torch.tensor([5, 5]), 8), torch.tensor(1.0))


def test_the_vector_quantizer_is_that_of_transformers() -> None:
    """Both terms of Chameleon's loss are equal at a weight of 1, whichever of them it stands at."""
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    torch.manual_seed(0)
    options = chameleon.ChameleonVQVAEConfig(embed_dim=4, num_embeddings=9, latent_channels=4)
    options.beta = 1.0
    peer = chameleon.ChameleonVQVAEVectorQuantizer(options)
    ours = VectorQuantizer(num_codes=9, size=4, update="gradient", commitment=1.0).build()
    assert isinstance(ours, NearestCode)
    with torch.no_grad():
        peer.embedding.weight.normal_()
        ours.codebook.copy_(peer.embedding.weight)
    images, targets = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    results = []
    for mine in (False, True):
        x = images.clone().requires_grad_()
        if mine:
            vectors, codes, loss = ours(x.permute(0, 2, 3, 1).flatten(0, 2), LocalGather())
            quantized, weight = vectors.reshape(2, 3, 3, 4).permute(0, 3, 1, 2), ours.codebook
        else:
            quantized, loss, codes = peer(x)
            weight = peer.embedding.weight
        gradients = torch.autograd.grad(loss + F.mse_loss(quantized, targets), (x, weight))
        results.append((quantized, loss, codes.flatten(), *gradients))
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs)
