import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.config import LIMoEConfig, MoMELIMoEConfig, without_noise
from moe.experts.products import Implementation
from moe.routers import ExpertChoice, ExpertChoiceRouter, TokenChoice
from moe.routers.health import routing_health
from moe.routers.recorder import listening
from moe.routers.routed import ByExpert
from moe.routers.sums import RouterSums
from moe.sizes import slot_flops
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.65, 0.25], [0.2, 0.35, 0.45], [0.6, 0.25, 0.15]])
ANY = torch.zeros(4, dtype=torch.int64)
MODALITIES = ("image", "text")
MIXED = Tokens((Segment("image", 7), Segment("text", 5)))
CHOOSING = LIMoEConfig(num_experts=4, every=1, router=ExpertChoice(experts_per_token=2.0))


def router_of(**options) -> ExpertChoiceRouter:
    """A router whose logits are its inputs."""
    router = ExpertChoice(**options).build(3, 3, None)
    router.gate.weight.data = torch.eye(3)
    return router


def layer_of(config: LIMoEConfig | MoMELIMoEConfig = CHOOSING) -> SparseFeedForward:
    torch.manual_seed(0)
    layer = SparseFeedForward(config, 8, 16, MODALITIES)
    layer.router.gate.weight.data *= 3  # surer, so that tokens differ in how many experts want them
    return layer


def x_of(tokens: int = 12) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))


def test_each_expert_takes_its_most_probable_tokens() -> None:
    # 1.5 experts per token: 4 * 1.5 / 3 = 2 tokens each. Columns of PROBS: 0.5 0.1 0.2 0.6 -> tokens 3, 0;
    # 0.3 0.65 0.35 0.25 -> tokens 1, 2; 0.2 0.25 0.45 0.15 -> tokens 2, 1.
    routed = router_of(experts_per_token=1.5)(PROBS.log(), ANY)
    assert routed.taken.token_EC.tolist() == [[3, 0], [1, 2], [2, 1]]
    assert routed.taken.served_EC.all()
    torch.testing.assert_close(routed.gate_EC, torch.tensor([[0.6, 0.5], [0.65, 0.35], [0.45, 0.25]]))
    assert routed.taken.token_N.tolist() == [3, 0, 1, 2, 2, 1]
    assert routed.tokens_per_expert.tolist() == [2, 2, 2]
    # Experts that change nothing: token 1 is weighted by 0.65 + 0.25, token 2 by 0.35 + 0.45.
    y = routed.combine(routed.dispatch(torch.eye(4)))
    torch.testing.assert_close(y, torch.diag(torch.tensor([0.5, 0.9, 0.8, 0.6])))


def test_a_token_that_no_expert_takes_gets_nothing_and_counts_as_dropped() -> None:
    # 0.75 experts per token: one token each, 3, 1 and 2. Token 0 is left over.
    routed = router_of(experts_per_token=0.75)(PROBS.log(), ANY)
    assert routed.taken.token_EC.flatten().tolist() == [3, 1, 2]
    assert routed.combine(routed.dispatch(torch.ones(4, 1)))[0].item() == 0.0
    sums = RouterSums.of(routed.said, torch.tensor([0, 0, 1, 1]), 2)
    assert sums.tokens_M.tolist() == [2, 2]
    assert sums.chosen_ME.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert sums.choices_M.tolist() == [2, 2]
    assert sums.dropped_M.tolist() == [1, 0]
    assert not sums.load_ME.any()
    torch.testing.assert_close(sums.probs_ME, torch.stack([PROBS[:2].sum(0), PROBS[2:].sum(0)]))
    torch.testing.assert_close(sums.confidence_M, torch.tensor([0.5 + 0.65, 0.45 + 0.6]))
    health = routing_health(sums, MODALITIES)
    assert health["dropped_image"].item() == 0.5, "one of two tokens"
    assert health["dropped_text"].item() == 0.0
    assert health["experts_used_text"].item() == pytest.approx(2.0)


def test_experts_of_each_token_stand_by_weight() -> None:
    choices = router_of(experts_per_token=1.5)(PROBS.log(), ANY).choices()
    assert choices.expert_TK.tolist() == [[0, -1], [1, 2], [2, 1], [0, -1]]
    assert torch.equal(choices.served_TK, choices.expert_TK >= 0)
    torch.testing.assert_close(choices.gate_TK, torch.tensor([[0.5, 0.0], [0.65, 0.25], [0.45, 0.35], [0.6, 0.0]]))


def test_padding_is_never_taken_and_makes_no_room() -> None:
    # Three tokens with 1 expert each: one token per expert. Token 3, whose 0.6 is the highest, is padding.
    valid = torch.tensor([True, True, True, False])
    routed = router_of()(PROBS.log(), ANY, valid)
    assert routed.taken.served_EC.sum(1).tolist() == [1, 1, 1]
    assert routed.taken.token_EC[:, 0].tolist() == [0, 1, 2]
    assert routed.tokens_per_expert.tolist() == [1, 1, 1]
    assert routed.taken.token_N[:3].tolist() == [0, 1, 2]
    sums = RouterSums.of(routed.said, ANY, 1, valid)
    assert sums.tokens_M.tolist() == [3]
    assert sums.dropped_M.tolist() == [0]
    # More experts per token than there are tokens for: each takes the three, none the padding.
    every = router_of(experts_per_token=9.0)(PROBS.log(), ANY, valid)
    assert every.taken.served_EC.sum(1).tolist() == [3, 3, 3]
    assert not every.gate_EC[~every.taken.served_EC].any()


@pytest.mark.parametrize("experts_per_token", [2.0, 3.0])
def test_what_a_token_gets_does_not_depend_on_padding_beside_it(experts_per_token: float) -> None:
    layer, x = layer_of(replace(CHOOSING, router=ExpertChoice(experts_per_token=experts_per_token))), x_of()
    valid = torch.arange(12) % 3 != 0  # 8 tokens
    padded = layer(x, Tokens(MIXED.segments, valid))
    alone = layer(x[valid], Tokens((Segment("image", 4), Segment("text", 4))))
    assert not padded.y[~valid].any()
    torch.testing.assert_close(padded.y[valid], alone.y)
    torch.testing.assert_close(padded.router_sums, alone.router_sums)
    served = RouterSums.unpack(alone.router_sums, 2).chosen_ME.sum(0)
    assert served.tolist() == [math.ceil(8 * experts_per_token / 4)] * 4


def test_an_expert_takes_only_tokens_of_its_modalities() -> None:
    config = MoMELIMoEConfig(
        pools={"image": 2, "text": 1}, common_experts=1, every=1, router=ExpertChoice(experts_per_token=2.0)
    )
    layer = layer_of(config)
    sums = RouterSums.unpack(layer(x_of(), MIXED).router_sums, 2)
    # 12 * 2 / 4 = 6 tokens each; the text's own expert finds only five that may go to it.
    assert sums.chosen_ME[:, :2].tolist() == [[6, 6], [0, 0]]
    assert sums.chosen_ME[:, 2].tolist() == [0, 5]
    assert sums.chosen_ME[:, 3].sum().item() == 6
    images = Tokens((Segment("image", 7),))
    out = layer(x_of(7), images)
    assert RouterSums.unpack(out.router_sums, 2).chosen_ME[:, 2].sum().item() == 0
    assert out.y.isfinite().all()


def one_hot_reference(x: Tensor, routed: ByExpert, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``einsum("nct,nc,ncd->td", P, G, FFN(P X))`` with P the one-hot choices, as the paper writes it."""
    chosen = torch.nn.functional.one_hot(routed.taken.token_EC, len(x)).to(x.dtype)
    chosen = chosen * routed.taken.served_EC[..., None]
    rows = torch.einsum("nct,td->ncd", chosen, x)
    made = torch.stack([expert(number, own) for number, own in enumerate(rows)])
    return torch.einsum("nct,nc,ncd->td", chosen, routed.gate_EC, made)


@pytest.mark.parametrize("padded", [False, True])
def test_output_and_gradients_equal_the_one_hot_products_of_the_paper(padded: bool) -> None:
    torch.manual_seed(0)
    valid = torch.arange(10) % 4 != 1 if padded else None
    router = ExpertChoice(experts_per_token=1.8).build(5, 3, [[True, True, False], [False, True, True]])
    modality, weight = torch.arange(10) % 2, torch.randn(3, 5, 5, dtype=torch.double)
    x = torch.randn(10, 5, dtype=torch.double, requires_grad=True)
    first = router(x, modality, valid)
    assert not first.taken.served_EC.all()
    gate = first.gate_EC.detach().double().requires_grad_()
    routed = replace(first, gate_EC=gate)

    def mine(x: Tensor, gate: Tensor) -> Tensor:
        rows = routed.dispatch(x)
        counts = routed.tokens_per_expert.tolist()
        parts = torch.split(rows, [*counts, len(rows) - sum(counts)])
        made = [(part @ own).tanh() for part, own in zip(parts[:-1], weight, strict=True)]
        return replace(routed, gate_EC=gate).combine(torch.cat([*made, torch.full_like(parts[-1], torch.nan)]))

    wanted = one_hot_reference(x, routed, lambda number, rows: (rows @ weight[number]).tanh())
    got = mine(x, gate)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    grads = torch.autograd.grad(got, [x, gate], upstream), torch.autograd.grad(wanted, [x, gate], upstream)
    torch.testing.assert_close(grads[0][0], grads[1][0])
    served = first.taken.served_EC
    torch.testing.assert_close(grads[0][1][served], grads[1][1][served])


def test_gradients_agree_with_finite_differences() -> None:
    routed = router_of(experts_per_token=1.5)(PROBS.log(), ANY)
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.double, requires_grad=True)
    gate = torch.rand(3, 2, dtype=torch.double, requires_grad=True)

    def through(x: Tensor, gate: Tensor) -> Tensor:
        return replace(routed, gate_EC=gate).combine(routed.dispatch(x).sin())

    assert torch.autograd.gradcheck(through, (x, gate))


def test_the_gates_gradient_is_that_of_the_softmax_and_padding_has_none() -> None:
    # Expert 0 takes token 0 alone: d p_0 / d logit = p_0 (1 - p_0), - p_0 p_1, - p_0 p_2 with p = 0.5, 0.3, 0.2.
    logits = PROBS.log().requires_grad_()
    routed = router_of()(logits, ANY, torch.tensor([True, True, True, False]))
    routed.gate_EC[0].sum().backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.25, -0.15, -0.1]))
    assert not logits.grad[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped", "batched"])
def test_all_implementations_give_what_the_loop_gives(implementation: Implementation, dtype: torch.dtype) -> None:
    tokens = Tokens(MIXED.segments, torch.arange(12) != 3)

    def run(how: Implementation) -> list[Tensor]:
        layer, x = layer_of(replace(CHOOSING, implementation=how)), x_of().to(dtype).requires_grad_()
        out = layer(x, tokens)
        (out.y.float().square().sum() + out.router_sums.sum()).backward()
        return [out.y, out.router_sums, x.grad, *(parameter.grad for parameter in layer.parameters())]

    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    for mine, theirs in zip(run(implementation), run("loop"), strict=True):
        torch.testing.assert_close(mine, theirs, **near)


def test_shared_experts_see_every_token_and_nothing_is_said_of_rounding() -> None:
    plain, both = layer_of(), layer_of(replace(CHOOSING, shared_experts=1))
    both.load_state_dict(plain.state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(both(x_of(), MIXED).y, plain(x_of(), MIXED).y + both.shared(x_of()).y)


def test_listening_hears_which_experts_took_a_token() -> None:
    layer = layer_of()
    tokens = Tokens(MIXED.segments, torch.arange(12) != 3)
    with listening({"routed": layer}) as heard:
        out = layer(x_of(), tokens)
    (one,) = heard
    assert (one.expert_TK[3] == -1).all(), "padding"
    took = torch.stack([(one.expert_TK == expert).sum() for expert in range(4)])
    assert torch.equal(took.float(), layer.tokens_per_expert(out.router_sums))
    assert ((one.gate_TK > 0) == (one.expert_TK >= 0)).all()
    assert (one.gate_TK.diff(dim=1) <= 0).all()


def test_costs_follow_the_mean_number_of_experts() -> None:
    # 4 * 8 * 16 operations an expert and token, 2 * 8 * 4 of the router.
    assert slot_flops(CHOOSING, 8, 16, 0, 2) == 2 * 512 + 64
    assert slot_flops(replace(CHOOSING, router=ExpertChoice(experts_per_token=3.0)), 8, 16, 0, 2) == 3 * 512 + 64
    by_tokens = replace(CHOOSING, router=TokenChoice(top_k=2, capacity_factor=1.5))
    assert slot_flops(by_tokens, 8, 16, 0, 2) == 2 * 512 + 64
    assert without_noise(CHOOSING) == CHOOSING
