import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from moe.analysis import (
    co_activation,
    entropy_of,
    expert_shares,
    expert_table,
    mutual_information,
    profiles,
    stability,
    strongest,
    usage,
)
from moe.config import LIMoEConfig
from moe.routers import TokenChoice
from moe.routers.recorder import listening
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens


def table(layer: str, experts: list[int], modality: list[str], **columns: list) -> pd.DataFrame:
    count = len(experts)
    base = {"layer": layer, "token": range(count), "choice": 0, "gate": 0.5, "served": True, "entropy": 0.3}
    return pd.DataFrame({**base, "expert": experts, "modality": modality, **columns})


FOUR = ["image", "image", "text", "text"]


def test_shares_by_hand() -> None:
    shares = expert_shares(table("a", [0, 0, 0, 2], FOUR)).set_index("expert")
    assert shares["choices"].to_dict() == {0: 3, 2: 1}
    assert shares["load"].to_dict() == {0: 0.75, 2: 0.25}
    assert shares["image"].to_dict() == pytest.approx({0: 2 / 3, 2: 0.0})
    assert shares["text"].to_dict() == pytest.approx({0: 1 / 3, 2: 1.0})


def test_usage_by_hand() -> None:
    found = usage(table("a", [0, 1, 2, 2], FOUR, gate=[0.5, 0.7, 0.9, 0.9], entropy=[0.6, 0.4, 0.1, 0.3]), {"a": 4})
    image, text = (found[found["modality"] == name].iloc[0] for name in ("image", "text"))
    assert image["experts_used"] == pytest.approx(2.0)
    assert text["experts_used"] == pytest.approx(1.0)
    assert (image["experts_touched"], text["experts_touched"]) == (2, 1)
    assert image["confidence"] == pytest.approx(0.6)
    assert image["local_entropy"] == pytest.approx(0.5)
    assert image["evenness"] == pytest.approx(0.5)  # log 2 / log 4
    assert text["evenness"] == 0.0
    assert image["global_entropy"] == pytest.approx(math.log(2))
    assert (image["dropped"], text["dropped"]) == (0.0, 0.0)


def test_a_row_for_each_expert_by_hand() -> None:
    first = table("a", [0, 0, 1, 1], FOUR, gate=[0.6, 0.8, 0.5, 0.9], entropy=[0.1, 0.2, 0.3, 0.4])
    second = table("a", [1, 2, 0, 0], FOUR, choice=1, gate=0.1, entropy=[0.1, 0.2, 0.3, 0.4])
    first["served"], second["served"] = [True, True, False, True], [True, False, False, True]
    found = expert_table(pd.concat([first, second])).set_index("expert")
    assert list(found.columns) == ["layer", "choices", "load", "dropped", "entropy", "confidence", "image", "text"]
    assert found["choices"].to_dict() == {0: 4, 1: 3, 2: 1}
    assert found["load"].to_dict() == {0: 0.5, 1: 0.375, 2: 0.125}
    # Expert 0 loses the third token's second choice, expert 1 its first one, expert 2 all that it has.
    assert found["dropped"].to_dict() == pytest.approx({0: 1 / 4, 1: 1 / 3, 2: 1.0})
    assert found["entropy"].to_dict() == pytest.approx({0: 0.25, 1: (0.3 + 0.4 + 0.1) / 3, 2: 0.2})
    assert found["confidence"].to_dict() == pytest.approx({0: 0.7, 1: 0.7, 2: math.nan}, nan_ok=True)
    assert found["image"].to_dict() == pytest.approx({0: 0.5, 1: 1 / 3, 2: 1.0})
    dropped = usage(pd.concat([first, second]), {"a": 3}).set_index("modality")["dropped"]
    assert dropped.to_dict() == {"image": 0.25, "text": 0.5}


def test_second_choices_count_for_load_and_not_for_tokens() -> None:
    two = pd.concat([table("a", [0, 0], ["text"] * 2), table("a", [1, 2], ["text"] * 2, choice=[1, 1])])
    found = usage(two, {"a": 4}).iloc[0]
    assert found["tokens"] == 2
    # Shares 1/2, 1/4, 1/4: the entropy is 1.5 log 2.
    assert found["experts_used"] == pytest.approx(2**1.5)


def test_mutual_information_by_hand() -> None:
    decided = table("a", [0, 0, 1, 1], FOUR)
    nothing = table("b", [0, 1, 0, 1], FOUR)
    found = mutual_information(pd.concat([decided, nothing]), "modality").set_index("layer")
    assert found.loc["a", "bits"] == pytest.approx(1.0)
    assert found.loc["a", "explained"] == pytest.approx(1.0)
    assert found.loc["b", "bits"] == pytest.approx(0.0, abs=1e-12)
    # Half of the tokens have no word: experts 0, 1 with words x, y.
    words = mutual_information(table("a", [0, 1, 0, 0], FOUR, word=["x", "y", None, None]), "word")
    assert words["bits"].item() == pytest.approx(1.0)


def test_profiles_by_hand() -> None:
    labels = ["cat"] * 2 + ["dog"] * 4 + ["rare", None]
    tokens = table("a", [0, 0, 0, 1, 1, 1, 1, 2], ["image"] * 8, label=labels)
    found = profiles(pd.concat([tokens, table("b", [3] * 8, ["image"] * 8, label=labels)]), "a", min_tokens=2)
    assert list(found.columns) == ["tokens", "bits", 0, 1]
    assert found.index.tolist() == ["cat", "dog"], "the last token has no label, one label too few tokens"
    assert found["tokens"].to_dict() == {"cat": 2, "dog": 4}
    assert found.loc["cat", [0, 1]].tolist() == [1.0, 0.0]
    assert found.loc["dog", [0, 1]].tolist() == [0.25, 0.75]
    # Of all seven, 3/7 go to expert 0. H(p) is 0 of cats and 0.8113 of dogs; the means with 3/7 are 5/7 and 19/56.
    assert found.loc["cat", "bits"] == pytest.approx(bits(5 / 7) - bits(3 / 7) / 2)
    assert found.loc["dog", "bits"] == pytest.approx(bits(19 / 56) - (bits(1 / 4) + bits(3 / 7)) / 2)
    assert found.loc["cat", "bits"] == pytest.approx(0.3706, abs=1e-4)
    assert profiles(tokens, "a", min_tokens=2, count=1).index.tolist() == ["cat"]
    assert len(profiles(tokens, "a", min_tokens=9)) == 0


def test_values_that_share_no_expert_are_a_bit_apart_and_equal_ones_none() -> None:
    tokens = table("a", [0] * 999 + [1], ["image"] * 999 + ["text"])
    found = profiles(tokens, "a", by="modality", min_tokens=1)
    assert found.loc["text", "bits"] == pytest.approx(1.0, abs=0.01)
    assert 0.0 <= found.loc["image", "bits"] < 1e-3


def bits(share: float) -> float:
    """Entropy of a share and its rest."""
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def test_where_the_tokens_of_an_expert_go_next() -> None:
    both = pd.concat([table("a", [0, 0, 0, 1], FOUR), table("b", [2, 2, 1, 1], FOUR)])
    found = co_activation(both, "a", "b")
    assert found.loc[0].to_dict() == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert found.loc[1].to_dict() == {1: 1.0, 2: 0.0}


def test_stability_beside_chance() -> None:
    found = stability(table("a", [0, 0, 1, 1], FOUR), table("a", [0, 1, 1, 1], FOUR)).iloc[0]
    assert found["tokens"] == 4
    assert found["kept"] == 0.75
    assert found["by_chance"] == pytest.approx(0.5 * 0.25 + 0.5 * 0.75)


def test_the_strongest_tokens_of_an_expert_come_once() -> None:
    tokens = table("a", [0, 0, 0, 1], FOUR, gate=[0.2, 0.9, 0.8, 1.0], word=["x", "y", "y", "z"])
    found = strongest(tokens, "a", 0, ["word"], count=5)
    assert found["word"].tolist() == ["y", "x"]
    assert found["gate"].tolist() == [0.9, 0.2]


def test_entropy() -> None:
    assert entropy_of([0.5, 0.5, 0.0]) == pytest.approx(math.log(2))
    assert entropy_of(np.array([1.0])) == 0.0


def test_routers_are_heard_while_somebody_listens() -> None:
    torch.manual_seed(0)
    config = LIMoEConfig(num_experts=3, every=1, router=TokenChoice(top_k=2).without_noise())
    layer = SparseFeedForward(config, 8, 16, ("image", "text"))
    holder = nn.ModuleDict({"routed": layer, "plain": nn.Linear(2, 2)})
    x, tokens = torch.randn(5, 8), Tokens((Segment("image", 2), Segment("text", 3)))
    with listening(dict(holder.items())) as heard:
        layer(x, tokens)
        layer(x[:2], Tokens((Segment("image", 2),)))
    layer(x, tokens)
    assert [(one.layer, len(one.expert_TK), one.num_experts) for one in heard] == [("routed", 5, 3), ("routed", 2, 3)]
    routed = layer.router(x, torch.zeros(5, dtype=torch.int64))
    assert torch.equal(heard[0].expert_TK, routed.expert_TK)
    torch.testing.assert_close(heard[0].gate_TK, routed.gate_TK)
    probs = routed.said.probs_TE
    torch.testing.assert_close(heard[0].entropy_T, -(probs * probs.log()).sum(-1))
    assert not heard[0].gate_TK.requires_grad


@pytest.mark.parametrize("priority", [False, True])
def test_what_a_capacity_drops_is_heard(priority: bool) -> None:
    torch.manual_seed(0)
    router = TokenChoice(capacity_factor=1.0, priority=priority).without_noise()
    config = LIMoEConfig(num_experts=2, every=1, router=router)
    layer = SparseFeedForward(config, 3, 6, ("image", "text"))
    layer.router.gate.weight.data = torch.eye(2, 3)
    # Room for ceil(8 / 2) = 4 tokens: six want expert 0, surer and surer; the third is padding, which takes no room.
    x = torch.tensor([[1.0 + n, 0.0, 1.0] for n in range(6)] + [[0.0, 1.0, 1.0]] * 2)
    valid = torch.arange(8) != 2
    with listening({"routed": layer}) as heard:
        y = layer(x, Tokens((Segment("image", 8),), valid)).y
    served = heard[0].served_TK[:, 0]
    lost = 0 if priority else 5
    assert served.tolist() == [place not in (lost, 2) for place in range(8)]
    assert torch.equal(y.abs().sum(-1) > 0, served), "what is not served gets zero"
