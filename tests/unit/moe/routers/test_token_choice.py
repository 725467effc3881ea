import math

import pytest
import torch

from moe.routers.token_choice import TokenChoiceRouter

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.2, 0.35, 0.45], [0.6, 0.25, 0.15]])
ANY = torch.zeros(4, dtype=torch.int64)


def router_of(**options) -> TokenChoiceRouter:
    """A router whose logits are its inputs."""
    router = TokenChoiceRouter(3, 3, **{"noise": 0.0, **options})
    router.gate.weight.data = torch.eye(3)
    return router


def test_the_most_probable_expert_is_chosen_with_its_probability_as_weight() -> None:
    choice = router_of()(PROBS.log(), ANY)
    assert choice.expert_TK.flatten().tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(choice.gate_TK.flatten(), torch.tensor([0.5, 0.7, 0.45, 0.6]))
    torch.testing.assert_close(choice.probs_TE, PROBS)


def test_two_choices_stand_best_first_and_can_be_renormalised() -> None:
    choice = router_of(top_k=2)(PROBS.log(), ANY)
    assert choice.expert_TK.tolist() == [[0, 1], [1, 2], [2, 1], [0, 1]]
    torch.testing.assert_close(choice.gate_TK[2], torch.tensor([0.45, 0.35]))
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
    router = TokenChoiceRouter(8, 4, noise=0.0)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    choice = router(x, torch.zeros(16, dtype=torch.int64))
    assert choice.logits_TE.dtype == choice.gate_TK.dtype == torch.float32
    torch.testing.assert_close(choice.logits_TE, x.float() @ router.gate.weight.t())


def test_noise_has_a_deviation_of_one_over_the_number_of_experts_and_is_for_training_only() -> None:
    torch.manual_seed(0)
    router = TokenChoiceRouter(2, 4, noise=1.0)
    x, ids = torch.zeros(20_000, 2), torch.zeros(20_000, dtype=torch.int64)
    choice = router(x, ids)
    assert choice.noise == 0.25
    # The deviation of a sample deviation of 80,000 numbers is 0.25 / sqrt(160,000) = 0.0006.
    assert (choice.noisy_TE - choice.logits_TE).std().item() == pytest.approx(0.25, abs=0.003)
    assert torch.equal(choice.probs_TE, torch.full_like(choice.probs_TE, 0.25)), "statistics are taken without noise"
    assert choice.expert_TK.unique().tolist() == [0, 1, 2, 3]
    still = router.eval()(x, ids)
    assert still.noise == 0.0
    assert torch.equal(still.noisy_TE, still.logits_TE)


def test_a_modality_goes_to_its_own_experts_and_shares_their_probability() -> None:
    # Modality 0 may use experts 0 and 2, modality 1 experts 1 and 2. 0.5 and 0.2 of 0.7; 0.35 and 0.45 of 0.8.
    router = router_of(allowed=[[True, False, True], [False, True, True]])
    choice = router(PROBS.log()[[0, 2]], torch.tensor([0, 1]))
    torch.testing.assert_close(choice.probs_TE, torch.tensor([[0.5 / 0.7, 0, 0.2 / 0.7], [0, 0.35 / 0.8, 0.45 / 0.8]]))
    assert choice.expert_TK.flatten().tolist() == [0, 2]
    assert choice.logits_TE[0, 1] == -math.inf


def test_a_selection_bias_changes_the_choice_but_not_the_weight() -> None:
    router = router_of(selection_bias=True)
    router.update_selection_bias(torch.tensor([6, 1, 2]), rate=0.2)  # the mean is 3: expert 0 has more, the others less
    torch.testing.assert_close(router.bias_E, torch.tensor([-0.2, 0.2, 0.2]))
    choice = router(PROBS.log(), ANY)
    # Token 0: 0.3, 0.5, 0.4; token 3: 0.4, 0.45, 0.35. Both leave expert 0; their gates are plain probabilities.
    assert choice.expert_TK.flatten().tolist() == [1, 1, 2, 1]
    torch.testing.assert_close(choice.gate_TK.flatten(), torch.tensor([0.3, 0.7, 0.45, 0.25]))


def test_a_selection_bias_opens_no_forbidden_expert() -> None:
    router = router_of(selection_bias=True, allowed=[[True, True, False]])
    router.bias_E += torch.tensor([0.0, 0.0, 10.0])
    assert router(PROBS.log(), ANY).expert_TK.flatten().tolist() == [0, 1, 1, 0]
