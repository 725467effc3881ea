import math

import pytest
import torch

from moe.config import LIMoEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice, TokenChoiceRouter
from moe.routers.sums import RouterSums
from moe.routers.token_choice import expected_load
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.2, 0.35, 0.45], [0.6, 0.25, 0.15]])
ANY = torch.zeros(4, dtype=torch.int64)


def router_of(allowed=None, **options) -> TokenChoiceRouter:
    """A router without noise whose logits are its inputs."""
    router = TokenChoice(**options).without_noise().build(3, 3, allowed)
    router.gate.weight.data = torch.eye(3)
    return router


def test_the_most_probable_expert_is_chosen_with_its_probability_as_weight() -> None:
    routed = router_of()(PROBS.log(), ANY)
    assert routed.expert_TK.flatten().tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(routed.gate_TK.flatten(), torch.tensor([0.5, 0.7, 0.45, 0.6]))
    torch.testing.assert_close(routed.said.probs_TE, PROBS)


def test_two_choices_stand_best_first_and_can_be_renormalised() -> None:
    routed = router_of(top_k=2)(PROBS.log(), ANY)
    assert routed.expert_TK.tolist() == [[0, 1], [1, 2], [2, 1], [0, 1]]
    torch.testing.assert_close(routed.gate_TK[2], torch.tensor([0.45, 0.35]))
    shares = router_of(top_k=2, renormalise=True)(PROBS.log(), ANY).gate_TK
    torch.testing.assert_close(shares[2], torch.tensor([0.45 / 0.8, 0.35 / 0.8]))


def test_a_single_renormalised_gate_is_one_and_keeps_a_gradient() -> None:
    # d log p_0 / dlogit = 1 - p_0, - p_1, - p_2 with p = 0.5, 0.3, 0.2.
    logits = PROBS[:1].log().requires_grad_()
    gate = router_of(renormalise=True)(logits, ANY[:1]).gate_TK
    assert gate.item() == 1.0
    gate.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.3, -0.2]]))


def test_the_gates_gradient_is_that_of_the_softmax() -> None:
    # dp_0 / dlogit = p_0 (1 - p_0), - p_0 p_1, - p_0 p_2 with p = 0.5, 0.3, 0.2.
    logits = PROBS[:1].log().requires_grad_()
    router_of()(logits, ANY[:1]).gate_TK.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.15, -0.1]]))


def test_bf16_tokens_are_routed_in_fp32() -> None:
    router = TokenChoice().without_noise().build(8, 4, None)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    routed = router(x, torch.zeros(16, dtype=torch.int64))
    assert routed.said.logits_TE.dtype == routed.gate_TK.dtype == torch.float32
    torch.testing.assert_close(routed.said.logits_TE, x.float() @ router.gate.weight.t())


def test_noise_has_a_deviation_of_one_over_the_number_of_experts_and_is_for_training_only() -> None:
    torch.manual_seed(0)
    router = TokenChoice(noise=1.0).build(2, 4, None)
    assert router.noise == 0.25
    x, ids = torch.zeros(20_000, 2), torch.zeros(20_000, dtype=torch.int64)
    state = torch.get_rng_state()
    routed = router(x, ids)
    torch.set_rng_state(state)
    noisy = 0.25 * torch.randn(20_000, 4)  # the logits are 0
    assert torch.equal(routed.expert_TK, noisy.argmax(-1, keepdim=True))
    torch.testing.assert_close(routed.gate_TK, noisy.softmax(-1).amax(-1, keepdim=True))
    assert torch.equal(routed.said.probs_TE, torch.full((20_000, 4), 0.25)), "statistics are taken without noise"
    torch.testing.assert_close(
        routed.said.load_TE, expected_load(torch.zeros_like(noisy), noisy, routed.expert_TK, 0.25)
    )
    assert routed.expert_TK.unique().tolist() == [0, 1, 2, 3]
    still = router.eval()(x, ids)
    assert still.said.load_TE is None
    assert torch.equal(still.gate_TK, torch.full((20_000, 1), 0.25))


def test_a_modality_goes_to_its_own_experts_and_shares_their_probability() -> None:
    # Modality 0 may use experts 0 and 2, modality 1 experts 1 and 2. 0.5 and 0.2 of 0.7; 0.35 and 0.45 of 0.8.
    router = router_of(allowed=[[True, False, True], [False, True, True]])
    routed = router(PROBS.log()[[0, 2]], torch.tensor([0, 1]))
    torch.testing.assert_close(
        routed.said.probs_TE, torch.tensor([[0.5 / 0.7, 0, 0.2 / 0.7], [0, 0.35 / 0.8, 0.45 / 0.8]])
    )
    assert routed.expert_TK.flatten().tolist() == [0, 2]
    assert routed.said.logits_TE[0, 1] == -math.inf


def test_a_selection_bias_changes_the_choice_but_not_the_weight() -> None:
    router = router_of(selection_bias_rate=0.2)
    assert router.balances
    router.after_step(torch.tensor([6, 1, 2]))  # the mean is 3: expert 0 has more, the others less
    torch.testing.assert_close(router.bias_E, torch.tensor([-0.2, 0.2, 0.2]))
    routed = router(PROBS.log(), ANY)
    # Token 0: 0.3, 0.5, 0.4; token 3: 0.4, 0.45, 0.35. Both leave expert 0; their gates are plain probabilities.
    assert routed.expert_TK.flatten().tolist() == [1, 1, 2, 1]
    torch.testing.assert_close(routed.gate_TK.flatten(), torch.tensor([0.3, 0.7, 0.45, 0.25]))


def test_a_selection_bias_opens_no_forbidden_expert() -> None:
    router = router_of(selection_bias_rate=0.2, allowed=[[True, True, False]])
    router.bias_E += torch.tensor([0.0, 0.0, 10.0])
    assert router(PROBS.log(), ANY).expert_TK.flatten().tolist() == [0, 1, 1, 0]


def test_a_router_without_a_bias_changes_nothing_after_a_step() -> None:
    router = router_of()
    assert not router.balances
    router.after_step(torch.tensor([6, 1, 2]))
    assert set(router.state_dict()) == {"gate.weight"}


def test_above_capacity_the_least_probable_choice_is_dropped_by_hand() -> None:
    # Five tokens want expert 0 with 0.5, 0.6, 0.7, 0.8, 0.9. Room is ceil(5 * 1.2 / 3) = 2, up to 4.
    probs = torch.tensor([[0.1 * n, 0.5 - 0.05 * n, 0.5 - 0.05 * n] for n in (5, 6, 7, 8, 9)])
    ids = torch.zeros(5, dtype=torch.int64)
    with pytest.warns(UserWarning, match="factor 1.2 asked, 2.4 used"):
        routed = router_of(capacity_factor=1.2)(probs.log(), ids)
    assert routed.tokens_per_expert.tolist() == [4, 0, 0]
    assert routed.said.dropped_T.tolist() == [1, 0, 0, 0, 0]
    assert routed.said.choices_T.tolist() == [1, 1, 1, 1, 1]
    assert routed.said.served_TE[:, 0].tolist() == [0, 1, 1, 1, 1]
    assert routed.choices().served_TK.flatten().tolist() == [False, True, True, True, True]
    # Experts that change nothing: each token comes back times its weight, the dropped one as zero.
    y = routed.combine(routed.dispatch(torch.ones(5, 1)))
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 0.6, 0.7, 0.8, 0.9]))
    with pytest.warns(UserWarning, match="factor 1.2 asked"):
        earlier = router_of(capacity_factor=1.2, priority=False)(probs.log(), ids)
    assert earlier.said.dropped_T.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.2), (2, 1.0)])
def test_precedence_goes_by_the_probability_before_weights_are_renormalised(top_k: int, factor: float) -> None:
    # Five tokens want expert 0, which has room for 4. Their weights become 1, or of two 0.505, 0.545, 0.590, 0.595 and
    # 0.592: by these the last place or the first token would be dropped instead of the least probable choice.
    ranked = torch.tensor([[0.50, 0.49], [0.48, 0.40], [0.46, 0.32], [0.44, 0.30], [0.42, 0.29]])
    probs = torch.cat([ranked, 1 - ranked.sum(1, keepdim=True)], dim=1)
    for order in ([0, 1, 2, 3, 4], [4, 0, 1, 2, 3], [1, 4, 3, 2, 0]):
        router = router_of(capacity_factor=factor, renormalise=True, top_k=top_k)
        with pytest.warns(UserWarning, match="factor"):
            routed = router(probs[order].log(), torch.zeros(5, dtype=torch.int64))
        assert routed.choices().served_TK[:, 0].tolist() == [place != 4 for place in order]


def test_the_selection_bias_counts_what_was_chosen_and_not_what_was_served() -> None:
    # Experts 0, 1, 2 are chosen 8, 4, 0 times, 4 on average; with room for 4 each serves 4, 4, 0.
    layer = SparseFeedForward(
        LIMoEConfig(num_experts=3, every=1, router=TokenChoice(selection_bias_rate=0.1, capacity_factor=1.0)),
        3,
        4,
        ("one",),
    ).eval()
    layer.router.gate.weight.data = torch.eye(3)
    x = torch.tensor([[3.0, 1.0, 0.0]] * 8 + [[1.0, 3.0, 0.0]] * 4)
    out = layer(x, Tokens((Segment("one", 12),)))
    sums = RouterSums.unpack(out.router_sums, 1)
    assert sums.dropped_M.tolist() == [4]
    counted = layer.tokens_per_expert(out.router_sums)
    assert counted.tolist() == [8, 4, 0]
    layer.after_step(counted)
    torch.testing.assert_close(layer.router.bias_E, torch.tensor([-0.1, 0.0, 0.1]))


def test_a_loss_made_of_noise_needs_noise() -> None:
    with pytest.raises(ValueError, match="router") as caught:
        TokenChoice(noise=0.0)
    assert str(caught.value) == (
        "router.losses: got load 0.005 with noise 0, allowed is load 0, or noise above 0: the load loss is made of the "
        "noise"
    )


def test_without_noise_there_is_no_load_loss() -> None:
    wanted = TokenChoice(top_k=2, noise=0.0, losses=NoisyRouterLossConfig(load=0.0))
    assert TokenChoice(top_k=2).without_noise() == wanted
