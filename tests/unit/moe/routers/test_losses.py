import math

import pytest
import torch

from moe.routers.losses import RouterLossConfig, entropy
from moe.routers.routed import ByToken
from moe.routers.sums import RouterSums
from moe.routers.token_choice import NoisyRouterLossConfig, expected_load

MODALITIES = ("image", "text")
PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
IMAGE_TWICE_TEXT_TWICE = torch.tensor([0, 0, 1, 1])
ROW_ENTROPY = 1.5 * math.log(2)  # 0.5 log 2 + 2 * 0.25 log 4


def routed_of(
    logits: torch.Tensor, noisy: torch.Tensor | None = None, noise: float = 0.0, **options: object
) -> ByToken:
    """What the most probable expert of each token makes of it."""
    ranked = (logits if noisy is None else noisy).softmax(-1)
    expert = ranked.topk(1, dim=-1).indices
    load = None if noisy is None else expected_load(logits, noisy, expert, noise)
    return ByToken.of(logits, logits.softmax(-1), expert, ranked.gather(1, expert), load_TE=load, **options)


def sums_of(
    routed: ByToken, modality: torch.Tensor = IMAGE_TWICE_TEXT_TWICE, valid: torch.Tensor | None = None
) -> RouterSums:
    return RouterSums.of(routed.said, modality, 2, valid)


def test_sums_of_four_tokens_and_three_experts() -> None:
    sums = sums_of(routed_of(PROBS.log()))
    assert sums.tokens_M.tolist() == [2, 2]
    torch.testing.assert_close(sums.probs_ME, torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.75, 0.75]]))
    torch.testing.assert_close(sums.entropy_M, torch.full((2,), 2 * ROW_ENTROPY))
    torch.testing.assert_close(sums.confidence_M, torch.tensor([1.0, 1.0]))
    assert sums.chosen_ME.tolist() == [[2, 0, 0], [0, 1, 1]]
    assert sums.dropped_M.tolist() == [0, 0]


def test_importance_is_the_squared_variation_of_the_probability_mass() -> None:
    # Mass 1.5, 1.25, 1.25; mean 4/3; variance (1/36 + 2/144) / 3 = 1/72; over 16/9: 9/1152.
    losses = RouterLossConfig(importance=1.0).of(sums_of(routed_of(PROBS.log())), MODALITIES)
    assert losses["importance"].item() == pytest.approx(9 / 1152)
    assert set(losses) == {"importance"}


def test_balance_is_the_number_of_experts_times_share_times_probability() -> None:
    # Shares 2/4, 1/4, 1/4; mean probabilities 0.375, 0.3125, 0.3125: 3 * (0.1875 + 2 * 0.078125) = 1.03125.
    losses = RouterLossConfig(0.0, balance=1.0).of(sums_of(routed_of(PROBS.log())), MODALITIES)
    assert losses["balance"].item() == pytest.approx(1.03125)


def test_z_is_the_mean_squared_logsumexp() -> None:
    # log p + c has a logsumexp of c: (1 + 4 + 0 + 9) / 4.
    logits = PROBS.log() + torch.tensor([1.0, -2.0, 0.0, 3.0])[:, None]
    losses = RouterLossConfig(0.0, z=1.0).of(sums_of(routed_of(logits)), MODALITIES)
    assert losses["z"].item() == pytest.approx(3.5, abs=1e-5)


def test_load_is_the_chance_to_reach_the_threshold_with_new_noise() -> None:
    # One token, deviation 1, best noisy logit 1.5. 1 - Phi(1.5 - 1), 1 - Phi(1.5 - 0), 1 - Phi(1.5 + 1).
    logits, noisy = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.5, 0.2, -1.0]])
    first, both = torch.tensor([[0]]), torch.tensor([[0, 1]])
    load = expected_load(logits, noisy, first, 1.0)
    torch.testing.assert_close(load, torch.tensor([[0.308538, 0.066807, 0.006210]]), atol=1e-6, rtol=0)
    # With two choices the second best noisy logit, 0.2, is the threshold: 1 - Phi(-0.8), 1 - Phi(0.2), 1 - Phi(1.2).
    two = expected_load(logits, noisy, both, 1.0)
    torch.testing.assert_close(two, torch.tensor([[0.788145, 0.420740, 0.115070]]), atol=1e-6, rtol=0)
    # Deviation 0.5 halves the distances' unit: 1 - Phi(1), 1 - Phi(3), 1 - Phi(5).
    half = expected_load(logits, noisy, first, 0.5)
    torch.testing.assert_close(half, torch.tensor([[0.158655, 0.001350, 2.9e-7]]), atol=1e-6, rtol=0)


def test_local_entropy_is_the_mean_of_each_modality() -> None:
    config = RouterLossConfig(0.0, local_entropy={"text": 1.0})
    sharp = torch.tensor([[20.0, 0.0, 0.0]])
    sums = sums_of(routed_of(torch.cat([sharp, sharp, PROBS.log()[2:]])))
    losses = config.of(sums, MODALITIES)
    assert set(losses) == {"local_entropy_text"}
    assert losses["local_entropy_text"].item() == pytest.approx(ROW_ENTROPY)


def test_global_entropy_is_what_is_missing_to_the_wanted_number_of_experts() -> None:
    # Text: mean probabilities 0.25, 0.375, 0.375; all three experts are wanted: log 3 - H.
    config = RouterLossConfig(0.0, global_entropy={"text": 1.0})
    losses = config.of(sums_of(routed_of(PROBS.log())), MODALITIES)
    wanted = math.log(3) - (0.25 * math.log(4) + 0.75 * math.log(8 / 3))
    assert losses["global_entropy_text"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("used", [1, 2, 4])
def test_global_entropy_is_zero_where_as_many_experts_as_wanted_are_used_alike(used: int) -> None:
    logits = torch.full((8, 4), -torch.inf)
    logits[torch.arange(8), torch.arange(8) % used] = 0.0  # every token is sure; together they use `used` experts
    config = RouterLossConfig(0.0, global_entropy={"image": 1.0}, min_experts={"image": used})
    sums = sums_of(routed_of(logits), torch.zeros(8, dtype=torch.int64))
    assert config.of(sums, MODALITIES)["global_entropy_image"].item() == pytest.approx(0.0, abs=1e-6)
    more = RouterLossConfig(0.0, global_entropy={"image": 1.0}, min_experts={"image": 2 * used})
    found = more.of(sums, MODALITIES)["global_entropy_image"].item()
    assert found == pytest.approx(math.log(2), rel=1e-5)


def test_more_experts_than_wanted_cost_nothing_and_give_no_gradient() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    config = RouterLossConfig(0.0, global_entropy={"image": 1.0}, min_experts={"image": 2})
    loss = config.of(sums_of(routed_of(logits), torch.zeros(4, dtype=torch.int64)), MODALITIES)
    loss["global_entropy_image"].backward()
    assert loss["global_entropy_image"].item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_absent_modality_counts_for_nothing() -> None:
    everything = RouterLossConfig(1.0, 1.0, 1.0, {"image": 1.0, "text": 1.0}, {"image": 1.0, "text": 1.0})
    logits = PROBS.log().requires_grad_()
    losses = everything.of(sums_of(routed_of(logits), torch.zeros(4, dtype=torch.int64)), MODALITIES)
    assert losses["local_entropy_text"].item() == 0.0
    assert losses["global_entropy_text"].item() == 0.0
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    config = NoisyRouterLossConfig(1.0, 1.0, 1.0, {"image": 1.0, "text": 1.0}, {"image": 1.0, "text": 1.0}, load=1.0)
    logits = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    noisy = logits.detach() + 0.3 * torch.randn(6, 3, dtype=torch.double)
    modality = torch.tensor([0, 0, 0, 1, 1, 1])

    def losses(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routed = routed_of(logits, noisy=noisy, noise=0.3)  # thresholds are constants
        return tuple(config.of(sums_of(routed, modality), MODALITIES).values())

    assert len(losses(logits)) == 8
    assert all(loss.item() > 0 for loss in losses(logits))
    assert torch.autograd.gradcheck(losses, (logits,))


def test_padding_does_not_count() -> None:
    valid = torch.tensor([True, True, True, False])
    sums = sums_of(routed_of(PROBS.log(), valid_T=valid), valid=valid)
    assert sums.tokens_M.tolist() == [2, 1]
    torch.testing.assert_close(sums.probs_ME[1], PROBS[2])
    assert sums.chosen_ME.tolist() == [[2, 0, 0], [0, 1, 0]]
    assert sums.dropped_M.tolist() == [0, 0]


def test_dropped_choices_are_counted_by_modality() -> None:
    sums = sums_of(routed_of(PROBS.log(), capacity=1))
    assert sums.choices_M.tolist() == [2, 2]
    assert sums.dropped_M.tolist() == [1, 0]
    assert sums.chosen_ME.tolist() == [[2, 0, 0], [0, 1, 1]], "as if none had been dropped"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity", [None, 1, 4])
def test_balance_is_switch_eq_4_whatever_a_capacity_drops(top_k: int, capacity: int | None) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(24, 4, dtype=torch.double) + torch.tensor([2.0, 0.5, 0.0, -1.0])).requires_grad_()
    valid = torch.arange(24) % 5 != 0
    probs = logits.softmax(-1)
    gate, expert = probs.topk(top_k, dim=-1)
    routed = ByToken.of(logits, probs, expert, gate, valid_T=valid, capacity=capacity)
    sums = RouterSums.of(routed.said, torch.arange(24) % 2, 2, valid)
    assert (sums.dropped_M.sum() > 0) == (capacity is not None)
    RouterLossConfig(0.0, balance=1.0).of(sums, MODALITIES)["balance"].backward()

    again = logits.detach().clone().requires_grad_()
    kept = [row.softmax(0) for row, real in zip(again, valid, strict=True) if real]
    shares = [0.0] * 4
    for row in kept:
        for chosen in row.argsort(descending=True)[:top_k].tolist():
            shares[chosen] += 1 / (len(kept) * top_k)
    switch = 4 * sum(share * torch.stack(kept)[:, e].mean() for e, share in enumerate(shares))
    switch.backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert logits.grad[valid].any()


def test_sums_travel_as_one_vector_and_add_up() -> None:
    whole = sums_of(routed_of(PROBS.log()))
    halves = [
        sums_of(routed_of(PROBS.log()[part]), IMAGE_TWICE_TEXT_TWICE[part]) for part in (slice(0, 1), slice(1, 4))
    ]
    again = RouterSums.unpack(halves[0].pack() + halves[1].pack(), 2)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(again, name), value)


def test_where_modalities_have_experts_of_their_own_spreads_are_taken_within_them() -> None:
    # Image: experts 0 and 1, mass 1 and 1. Text: experts 1 and 2, mass 0.5 and 1.5: mean 1, variance 0.25. Half of the
    # tokens are text.
    logits = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0.25, 0.75]]).log()
    allowed = [[True, True, False], [False, True, True]]
    config = RouterLossConfig(importance=1.0, global_entropy={"text": 1.0})
    losses = config.of(sums_of(routed_of(logits)), MODALITIES, allowed)
    assert losses["importance"].item() == pytest.approx(0.125)
    missing = math.log(2) - (0.25 * math.log(4) + 0.75 * math.log(4 / 3))  # of two experts, not of three
    assert losses["global_entropy_text"].item() == pytest.approx(missing, rel=1e-5)


def test_entropy_of_certainty_has_a_finite_gradient() -> None:
    probs = torch.tensor([1.0, 0.0], requires_grad=True)
    entropy(probs).backward()
    assert probs.grad is not None
    assert probs.grad.isfinite().all()
