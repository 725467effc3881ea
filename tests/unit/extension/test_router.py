"""A router that is in no union: code of one file, used in a chain through the public interface alone."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
import torch
from tiny_chain import CONFIG, TOKENS, make_batch
from torch import Tensor

from moe.config import LIMoEConfig
from moe.routers import Allowed, LinearRouter, RouterConfig
from moe.routers.losses import RouterLossConfig
from moe.routers.recorder import listening
from moe.routers.routed import ByToken
from moe.routers.sums import RouterSums
from moe.sizes import slot_flops
from moe.sparse import SparseFeedForward, served_shares
from moe.tokens import Segment, Tokens
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.errors import ModelError
from omnivl.objectives import LM, MLM, UniVLC


@dataclass(frozen=True)
class DoubtLossConfig(RouterLossConfig):
    """One loss more than others have: the mean entropy of all tokens' probabilities."""

    doubt: float = 0.1

    def weights(self) -> dict[str, float]:
        return {**super().weights(), "doubt": self.doubt}

    def of(self, sums, modalities, allowed=None) -> dict[str, Tensor]:
        doubt = sums.entropy_M.sum() / sums.tokens_M.sum().clamp_min(1.0)
        return {**super().of(sums, modalities, allowed), "doubt": doubt}


@dataclass(frozen=True)
class Halves(RouterConfig):
    """A token goes to the better expert of the lower half, and to that of the upper half."""

    kind: Literal["halves"] = "halves"
    losses: DoubtLossConfig = field(default_factory=DoubtLossConfig)

    @property
    def experts_per_token(self) -> float:
        return 2.0

    @property
    def looks_ahead(self) -> bool:
        return True  # it does not; so that the refusal can be seen

    def build(self, hidden_size: int, num_experts: int, allowed: Allowed) -> "HalvesRouter":
        return HalvesRouter(hidden_size, num_experts, allowed)


class HalvesRouter(LinearRouter):
    """See ``Halves``. It remembers what its experts served in the last step."""

    def __init__(self, hidden_size: int, num_experts: int, allowed: Allowed) -> None:
        super().__init__(hidden_size, num_experts, allowed)
        self.register_buffer("served_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, modality_T: Tensor, valid_T: Tensor | None = None) -> ByToken:
        logits_TE = self.logits(x_TD, modality_T)
        probs_TE = logits_TE.softmax(-1)
        middle = probs_TE.shape[1] // 2
        expert_T2 = torch.stack([probs_TE[:, :middle].argmax(-1), middle + probs_TE[:, middle:].argmax(-1)], dim=1)
        return ByToken.of(logits_TE, probs_TE, expert_T2, probs_TE.gather(1, expert_T2), valid_T=valid_T)

    @property
    def balances(self) -> bool:
        return True

    def after_step(self, tokens_per_expert_E: Tensor) -> None:
        self.served_E.copy_(tokens_per_expert_E)


FFN = LIMoEConfig(num_experts=4, every=1, router=Halves())
OBJECTIVES = (UniVLC(), MLM())
MODEL = replace(CONFIG, ffn=FFN)


def chain_of(recompute: str = "none"):
    torch.manual_seed(0)
    return build_chain(replace(MODEL, recompute=recompute), OBJECTIVES, TOKENS)


def first_state() -> State:
    return State.from_batch(make_batch("image_text", OBJECTIVES), plan_layout(OBJECTIVES, "image_text", 4, 1))


def test_choices_by_hand() -> None:
    router = Halves().build(4, 4, None)
    router.gate.weight.data = torch.eye(4)
    probs = torch.tensor([[0.5, 0.2, 0.1, 0.2], [0.1, 0.2, 0.4, 0.3]])
    routed = router(probs.log(), torch.zeros(2, dtype=torch.int64))
    assert routed.expert_TK.tolist() == [[0, 3], [1, 2]]
    assert routed.tokens_per_expert.tolist() == [1, 1, 1, 1]
    # Experts that change nothing: 0.5 + 0.2 of the first token, 0.2 + 0.4 of the second.
    y = routed.combine(routed.dispatch(torch.ones(2, 1)))
    torch.testing.assert_close(y.flatten(), torch.tensor([0.7, 0.6]))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_it_trains_in_a_chain_with_its_losses_figures_and_steps(recompute: str) -> None:
    chain = chain_of(recompute)
    state = chain(first_state())
    raw = {name.removeprefix("loss/router/"): state[name] for name in state if name.startswith("loss/router/")}
    assert set(raw) == {"importance", "doubt"}
    wanted = state["loss/univlc"] + state["loss/mlm"] + 0.005 * raw["importance"] + 0.1 * raw["doubt"]
    torch.testing.assert_close(state["loss"], wanted)
    assert state["metric/router/dropped_image"].item() == 0.0
    assert 2.0 <= state["metric/router/experts_used_text"].item() <= 4.0, "two halves have at least one each"
    state["loss"].backward()
    router = chain.visual_00.block.ffn.router
    assert router.gate.weight.grad is not None and router.gate.weight.grad.any()
    served = chain.visual_00.tokens_per_expert["ffn"]
    assert served[:2].sum() == served[2:].sum() == 4 * 5, "four pictures of five tokens"
    chain.after_step()
    assert torch.equal(router.served_E, served)


def test_its_weights_and_buffers_come_back() -> None:
    chain, other = chain_of(), chain_of()
    chain(first_state())["loss"].backward()
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    chain.after_step()
    assert "visual_00.block.ffn.router.served_E" in chain.state_dict()
    other.load_state_dict(chain.state_dict())
    assert torch.equal(other(first_state())["loss"], chain(first_state())["loss"])


def test_it_is_heard_and_counted() -> None:
    layer = SparseFeedForward(FFN, 8, 16, ("image", "text"))
    tokens = Tokens((Segment("image", 3), Segment("text", 2)), torch.tensor([True] * 4 + [False]))
    with listening({"layer": layer}) as heard:
        out = layer(torch.randn(5, 8), tokens)
    assert heard[0].expert_TK.shape == (5, 2)
    assert heard[0].served_TK.tolist() == [[True, True]] * 4 + [[False, False]]
    assert RouterSums.unpack(out.router_sums, 2).choices_M.tolist() == [6, 2]
    assert slot_flops(FFN, 8, 16, 0, 1) == 2 * 4 * 8 * 16 + 2 * 8 * 4
    assert set(served_shares(layer).values()) == {0.5}


def test_what_it_says_of_itself_is_heeded() -> None:
    with pytest.raises(ModelError, match=r"model\.ffn\.router\.kind: got 'halves' with an objective that writes"):
        build_chain(MODEL, (UniVLC(), LM()), TOKENS)
    with pytest.raises(ValueError, match=r"ffn\.num_experts: got 1 with 2 experts per token, allowed is 2 or more"):
        LIMoEConfig(num_experts=1, router=Halves())
