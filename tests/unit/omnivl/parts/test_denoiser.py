"""The denoiser: what it sees of the condition, its long connections, and times."""

import math

import torch

from omnivl.parts.denoiser import Denoiser, DenoiserSizes, waves


def denoiser(layers: int = 3) -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(DenoiserSizes(hidden_size=8, num_heads=2, layers=layers), parts=4, part_size=5, condition_size=6)
    torch.nn.init.normal_(made.outer.weight)  # it starts at zero
    return made


def given(count: int = 2) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    noisy, condition = torch.randn(count, 4, 5, generator=random), torch.randn(count, 3, 6, generator=random)
    mask = torch.tensor([[True, True, False]]).repeat(count, 1)
    return noisy, torch.tensor([0.2, 0.7])[:count], condition, mask


def test_padding_of_the_condition_changes_nothing() -> None:
    made, (noisy, times, condition, mask) = denoiser(), given()
    nobody = torch.zeros(2, dtype=torch.bool)
    other = torch.where(mask[..., None], condition, 7.0)
    torch.testing.assert_close(
        made(noisy, times, condition, mask, nobody), made(noisy, times, other, mask, nobody), rtol=0, atol=1e-6
    )
    seen = condition.clone()
    seen[:, 1] += 1.0
    assert (made(noisy, times, seen, mask, nobody) - made(noisy, times, condition, mask, nobody)).abs().max() > 1e-3


def test_a_condition_that_is_left_out_says_nothing_not_even_its_length() -> None:
    made, (noisy, times, condition, mask) = denoiser(), given()
    second = torch.tensor([False, True])
    whole = torch.ones_like(mask)
    one = made(noisy, times, condition, mask, second)
    other = made(noisy, times, condition.flip(0) + 1.0, whole, second)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-6)
    assert (one[0] - other[0]).abs().max() > 1e-3
    one[1].sum().backward()
    assert made.nothing.grad is not None and made.nothing.grad.any()


def test_blocks_are_joined_first_with_last() -> None:
    """Of five blocks the fourth reads the second, and the fifth the first; each is then the mean of both by its map."""
    made, (noisy, times, condition, mask) = denoiser(layers=5), given()
    assert len(made.joins) == 2
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for place, block in enumerate(made.blocks):
        block.register_forward_hook(lambda _, given, out, place=place: seen.update({place: (given[0], out)}))
    made(noisy, times, condition, mask, torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(seen[3][0], made.joins[1](torch.cat([seen[2][1], seen[1][1]], dim=-1)))
    torch.testing.assert_close(seen[4][0], made.joins[0](torch.cat([seen[3][1], seen[0][1]], dim=-1)))
    torch.testing.assert_close(seen[2][0], seen[1][1])


def test_a_new_denoiser_predicts_zero() -> None:
    made = Denoiser(DenoiserSizes(hidden_size=8, num_heads=2, layers=1), parts=4, part_size=5, condition_size=6)
    noisy, times, condition, mask = given()
    assert not made(noisy, times, condition, mask, torch.zeros(2, dtype=torch.bool)).any()


def test_waves_by_hand() -> None:
    found = waves(torch.tensor([0.0, 0.002]), 4)
    slow = 2.0 / math.sqrt(10000.0)
    wanted = torch.tensor([[1.0, 1.0, 0.0, 0.0], [math.cos(2), math.cos(slow), math.sin(2), math.sin(slow)]])
    torch.testing.assert_close(found, wanted)
    assert waves(torch.tensor([0.5]), 5).shape == (1, 5)
