from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from moe.config import LIMoEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice
from moe.routers.sums import RouterSums
from omnivl.chain.gather import Gather
from omnivl.chain.layout import lay_out
from omnivl.chain.objective import Head, Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DataKind
from omnivl.objectives import LM, MFM, MLM, MRM, VLM, Demands, Objective, ObjectiveLoss, UniVLC
from omnivl.parts.losses import Losses

SIZES = HeadSizes(dict.fromkeys(("visual", "text", "fused", "generation"), 4), 5, 11, 3, 2, 1, 4)


@dataclass(frozen=True)
class Double(Objective):
    """Twice a value found in the state."""

    kind: Literal["double", "other"] = "double"

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        return Demands()

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        value = state[f"{self.key}/value"]
        return ObjectiveLoss(2 * value, {"seen": value})


def state_of(*active: str, **tensors: Tensor) -> State:
    named = {name.replace("__", "/"): tensor for name, tensor in tensors.items()}
    return State(named, StepLayout("image_text", 2, 1, objectives=active))


def test_total_is_the_weighted_sum_by_hand() -> None:
    # 0.5 * (2 * 3) + 1 * (2 * 5) = 13; d total / d value = 0.5 * 2 and 2.
    first, second = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    state = state_of("double", "other", double__value=first, other__value=second, weight__double=torch.tensor(0.5))
    out = Losses(SIZES, [Double(), Double(kind="other")])(state)
    assert {name: tensor.item() for name, tensor in out.items()} == {
        **{"loss": 13.0, "loss/double": 6.0, "loss/other": 10.0},
        **{"metric/double/seen": 3.0, "metric/other/seen": 5.0},
    }
    assert not out["metric/double/seen"].requires_grad
    out["loss"].backward()
    assert first.grad is not None
    assert second.grad is not None
    assert (first.grad.item(), second.grad.item()) == (1.0, 2.0)


def test_only_active_objectives_count() -> None:
    state = state_of("other", other__value=torch.tensor(1.0))
    out = Losses(SIZES, [Double(), Double(kind="other")])(state)
    assert set(out) == {"loss", "loss/other", "metric/other/seen"}
    with pytest.raises(AssertionError, match="no objective acts on image_text"):
        Losses(SIZES, [Double()])(state_of())


def test_streams_end_here_and_metrics_leave() -> None:
    state = state_of(
        "double",
        double__value=torch.tensor(1.0),
        memory=torch.zeros(2, 3, 4),
        metric__univlc__temperature=torch.tensor(0.07),
    )
    assert set(Losses(SIZES, [Double()])(state)) == {
        *("loss", "loss/double", "metric/double/seen", "metric/univlc/temperature")
    }


def test_router_losses_are_means_over_layers_weighted_by_the_model() -> None:
    """Importance is 9 / 1152 in one layer (probability mass 1.5, 1.25, 1.25) and 0 in the other; z is 2 and 4."""
    losses = NoisyRouterLossConfig(importance=64.0, load=0.0, z=0.5)
    ffn = LIMoEConfig(num_experts=3, router=TokenChoice(losses=losses))
    state = state_of(
        "double",
        double__value=torch.tensor(1.0),
        router__visual_01=sums([[1.5, 1.25, 1.25], [0, 0, 0], [0, 0, 0]], z=8.0).pack(),
        router__visual_03=sums([[2.0, 2.0, 2.0], [0, 0, 0], [0, 0, 0]], z=16.0).pack(),
    )
    out = Losses(SIZES, [Double()], fillings={"visual": ffn})(state)
    assert out["loss/router/importance"].item() == pytest.approx(9 / 2304)
    assert out["loss/router/z"].item() == pytest.approx(3.0)
    assert out["loss"].item() == pytest.approx(2.0 + 64 * 9 / 2304 + 0.5 * 3.0)


def test_stacks_of_other_fillings_have_losses_apart() -> None:
    """Importance is 9 / 1152 in one stack, weighted by 64; z is 2 and 6 in the other's layers, weighted by 0.25."""
    none = NoisyRouterLossConfig(importance=0.0, load=0.0)
    uneven, large = replace(none, importance=64.0), replace(none, z=0.25)
    visual, text = (LIMoEConfig(num_experts=3, router=TokenChoice(losses=losses)) for losses in (uneven, large))
    state = state_of(
        "double",
        double__value=torch.tensor(1.0),
        router__visual_01=sums([[1.5, 1.25, 1.25], [0, 0, 0], [0, 0, 0]], z=8.0).pack(),
        router__text_00=sums([[2.0, 2.0, 2.0], [0, 0, 0], [0, 0, 0]], z=8.0).pack(),
        router__text_01=sums([[2.0, 2.0, 2.0], [0, 0, 0], [0, 0, 0]], z=24.0).pack(),
    )
    out = Losses(SIZES, [Double()], fillings={"visual": visual, "text": text})(state)
    assert out["loss/router/visual/importance"].item() == pytest.approx(9 / 1152)
    assert out["loss/router/text/z"].item() == pytest.approx(4.0)
    assert out["loss"].item() == pytest.approx(2.0 + 64 * 9 / 1152 + 0.25 * 4.0)


def sums(probs: list[list[float]], z: float) -> RouterSums:
    """Four image tokens with the given probability mass."""
    four, none = torch.tensor([4.0, 0, 0]), torch.zeros(3)
    return RouterSums(four, none, none, four, none, torch.tensor([z, 0, 0]), torch.tensor(probs), *torch.zeros(2, 3, 3))


def test_losses_of_lower_precision_are_refused() -> None:
    state = state_of("double", double__value=torch.tensor(1.0, dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match=r"double computes its loss in torch\.bfloat16"):
        Losses(SIZES, [Double()])(state)


def test_heads_follow_the_objectives() -> None:
    both = Losses(SIZES, [MLM(), LM(), VLM(), MRM(), UniVLC(queue_size=2)])
    assert both.heads_of("mlm").vocabulary is both.heads_of("lm").vocabulary is both.vocabulary
    assert set(both.heads) == {"vlm", "mrm", "univlc"}
    assert both.heads_of("vlm") == Heads(both.heads["vlm"])
    bare = Losses(SIZES, [MFM(), UniVLC()])
    assert bare.vocabulary is None
    assert set(bare.heads) == {"mfm"}


def test_one_kind_stands_twice_under_two_names() -> None:
    layer = Losses(SIZES, [MFM(), MFM(name="slow", every=2)])
    assert set(layer.heads) == {"mfm", "slow"}
    value = torch.tensor(1.0)
    out = Losses(SIZES, [Double(name="one"), Double(name="two")])(
        state_of("one", "two", one__value=value, two__value=3 * value)
    )
    assert (out["loss/one"].item(), out["loss/two"].item()) == (2.0, 6.0)


def test_heads_of_objectives_that_act_in_no_step_are_idle() -> None:
    layer = Losses(SIZES, [MLM(), VLM()])
    idle = {id(parameter) for parameter in layer.idle_parameters([StepLayout("image_text", 2, 1, objectives=("vlm",))])}
    assert layer.vocabulary is not None
    assert idle == {id(parameter) for parameter in layer.vocabulary.parameters()}


def test_heads_change_after_the_step_only() -> None:
    layer, seen = Losses(SIZES, [Double()]), list[str]()

    class Counting(Head):
        def after_step(self, gather: Gather) -> None:
            seen.append("after")

        def discard_step(self) -> None:
            seen.append("discard")

    layer.heads["counting"] = Counting()
    layer(state_of("double", double__value=torch.tensor(1.0)))
    assert not seen
    layer.after_step()
    layer.discard_step()
    assert seen == ["after", "discard"]


def predicting(objective: Objective, **tensors: Tensor) -> State:
    asks = objective.asks("image_text", 2)
    return State(tensors, lay_out({objective.key: asks}, "image_text", 2, 1, "predict"))


def test_matching_gives_log_odds() -> None:
    layer = Losses(SIZES, [VLM()])
    head = layer.heads["vlm"]
    head.output.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])  # type: ignore[union-attr]
    fused = torch.tensor([[[1.0, 4.0, 0, 0]], [[2.0, 0.5, 0, 0]]])
    assert layer(predicting(VLM(), fused=fused))["vlm/prediction"].tolist() == [3.0, -1.5]


def test_generation_gives_logits_behind_the_last_position() -> None:
    layer = Losses(SIZES, [LM()])
    assert layer.vocabulary is not None
    stream = torch.randn(2, 3, 4)
    logits = layer(predicting(LM(), generation=stream))["lm/prediction"]
    torch.testing.assert_close(logits, layer.vocabulary(stream[:, 2]))
    assert logits.shape == (2, 11)


def test_encoding_passes_through() -> None:
    state = State({"visual_embedding": torch.zeros(2, 3)}, StepLayout("image_text", 2, 1, "encode"))
    assert Losses(SIZES, [])(state) is state
