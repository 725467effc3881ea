"""Statistics of a routed layer, on simple sums."""

import math

import pytest
import torch

from moe.routers.health import layer_health, mean_health, routing_health
from moe.routers.sums import RouterSums

MODALITIES = ("image", "text")

# Six image tokens on experts 0 (three), 1 and 2 (one each; one choice dropped), two text tokens on expert 2.
SUMS = RouterSums(
    tokens_M=torch.tensor([6.0, 2.0]),
    entropy_M=torch.tensor([3.0, 2.0]),
    confidence_M=torch.tensor([3.0, 1.8]),
    choices_M=torch.tensor([6.0, 2.0]),
    dropped_M=torch.tensor([1.0, 0.0]),
    z_M=torch.zeros(2),
    probs_ME=torch.zeros(2, 3),
    load_ME=torch.zeros(2, 3),
    chosen_ME=torch.tensor([[3.0, 1.0, 1.0], [0.0, 0.0, 2.0]]),
)


def test_figures_by_modality() -> None:
    found = {name: value.item() for name, value in routing_health(SUMS, MODALITIES).items()}
    entropy = 0.6 * math.log(1 / 0.6) + 0.4 * math.log(5)
    assert found == pytest.approx(
        {
            **{"experts_used_image": math.exp(entropy), "experts_used_text": 1.0},
            **{"confidence_image": 0.5, "confidence_text": 0.9, "entropy_image": 0.5, "entropy_text": 1.0},
            **{"dropped_image": 1 / 6, "dropped_text": 0.0},
        }
    )


def test_figures_of_a_layer_count_all_tokens_alike() -> None:
    found = {name: value.item() for name, value in layer_health(SUMS).items()}
    shares = (3 / 7, 1 / 7, 3 / 7)
    assert found == pytest.approx(
        {
            "experts_used": math.exp(-sum(share * math.log(share) for share in shares)),
            **{"confidence": 4.8 / 8, "entropy": 5 / 8, "dropped": 1 / 8, "largest_load": 9 / 7},
        }
    )


def test_a_modality_without_a_token_is_not_a_number_and_left_out_of_means() -> None:
    none = RouterSums(*(torch.zeros_like(getattr(SUMS, name)) for name in SUMS.__dataclass_fields__))
    empty = routing_health(none, MODALITIES)
    assert all(math.isnan(value.item()) for value in empty.values())
    full = routing_health(SUMS, MODALITIES)
    means = mean_health([empty, full], ["text"])
    assert means.keys() == {name for name in full if name.endswith("_text")}
    assert all(means[name].item() == full[name].item() for name in means)
