"""Fewer experts: which ones stay, how weights are averaged, and where nothing changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.config import LIMoEConfig, MoMELIMoEConfig
from moe.reduce import merge, output_similarity, pools_of, prune, reduced, reduced_config, router_similarity
from moe.routers import ExpertChoice, TokenChoice
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

STILL = TokenChoice(noise=0.0, renormalise=True, losses=replace(TokenChoice().losses, load=0.0))
CONFIG = LIMoEConfig(num_experts=4, router=STILL, implementation="loop")


def layer(config: Any = CONFIG, seed: int = 0) -> SparseFeedForward:
    torch.manual_seed(seed)
    made = SparseFeedForward(config, 6, 12, ("image", "text"))
    for parameter in made.parameters():
        parameter.data.normal_()
    return made


def run(slot: SparseFeedForward, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for some tokens, and how many chose each expert."""
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1))
    made = slot(x, Tokens((Segment("image", tokens // 2), Segment("text", tokens - tokens // 2))))
    assert made.router_sums is not None
    return made.y, slot.tokens_per_expert(made.router_sums)


def smaller(slot: SparseFeedForward, groups: list[list[int]], counts: torch.Tensor) -> SparseFeedForward:
    made = layer(replace(slot.config, num_experts=len(groups)), seed=7)
    made.load_state_dict(reduced(slot.state_dict(), groups, counts))
    return made


def test_the_least_used_go_and_of_equals_the_first_stays() -> None:
    counts = torch.tensor([5.0, 0.0, 9.0, 5.0])
    assert prune(counts, [[0, 1, 2, 3]], 3) == [[0], [2], [3]]
    assert prune(counts, [[0, 1, 2, 3]], 2) == [[0], [2]]
    assert prune(counts, [[0, 1], [2, 3]], 1) == [[0], [2]]


def test_the_others_join_the_most_similar_of_the_most_used() -> None:
    """Experts 0 and 2 are used most; 1 is nearer to 2, 3 to 0."""
    counts = torch.tensor([5.0, 1.0, 9.0, 2.0])
    similarity = torch.tensor([[1.0, 0.1, 0.0, 0.8], [0.1, 1.0, 0.7, 0.9], [0.0, 0.7, 1.0, 0.2], [0.8, 0.9, 0.2, 1.0]])
    assert merge(counts, similarity, [[0, 1, 2, 3]], 2) == [[0, 3], [1, 2]]
    assert merge(counts, similarity, [[0, 1], [2, 3]], 1) == [[0, 1], [2, 3]]


def test_weights_are_averaged_by_use() -> None:
    """Uses of 1 and 3 make 6 of the values 0 and 8; two experts without tokens weigh the same: 2 and 4 make 3."""
    counts = torch.tensor([1.0, 3.0, 0.0, 0.0])
    values = torch.tensor([[0.0], [8.0], [2.0], [4.0]])
    weights = {
        "experts.fc1_bias": values,
        "router.gate.weight": values,
        "router.bias_E": values[:, 0],
        "shared.x": values,
    }
    made = reduced(weights, [[0, 1], [2, 3]], counts)
    assert made["experts.fc1_bias"].tolist() == [[6.0], [3.0]]
    assert made["router.gate.weight"].tolist() == [[6.0], [3.0]]
    assert made["router.bias_E"].tolist() == [6.0, 3.0]
    assert made["shared.x"] is values


def test_merging_two_identical_experts_changes_nothing() -> None:
    slot = layer()
    for parameter in (*slot.experts.parameters(), slot.router.get_parameter("gate.weight")):
        parameter.data[3] = parameter.data[1]
    before, counts = run(slot)
    assert (counts > 0).sum() >= 3
    similarity = router_similarity(slot.router.get_parameter("gate.weight"))
    made = smaller(slot, [[0], [1, 3], [2]], counts)
    after, fewer = run(made)
    torch.testing.assert_close(after, before)
    assert fewer.tolist() == [counts[0], counts[1] + counts[3], counts[2]]
    assert similarity[1, 3].item() == pytest.approx(1.0)
    other = layer(seed=3)
    wrong = smaller(other, [[0], [1, 3], [2]], run(other)[1])
    assert not torch.allclose(run(wrong)[0], run(other)[0])


@pytest.mark.parametrize("top_k", [1, 2])
def test_pruning_an_expert_without_tokens_changes_nothing(top_k: int) -> None:
    slot = layer(replace(CONFIG, router=replace(STILL, top_k=top_k, selection_bias_rate=0.1)))
    slot.router.get_buffer("bias_E")[2] = -2.0  # below any probability
    before, counts = run(slot)
    assert counts[2] == 0
    assert counts.sum() == 40 * top_k
    groups = prune(counts, pools_of(slot.config), 3)
    assert groups == [[0], [1], [3]]
    made = smaller(slot, groups, counts)
    assert made.router.get_parameter("gate.weight").shape == (3, 6)
    after, fewer = run(made)
    torch.testing.assert_close(after, before)
    assert fewer.tolist() == counts[[0, 1, 3]].tolist()


def test_outputs_are_compared_token_by_token() -> None:
    """Two experts that agree on one token and are opposite on the other: 0; one with itself: 1."""
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, -1.0]]])
    torch.testing.assert_close(output_similarity(outputs), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_pools_keep_their_bounds() -> None:
    config = MoMELIMoEConfig(pools={"image": 3, "text": 1}, common_experts=2, router=STILL)
    assert pools_of(config) == [[0, 1, 2], [3], [4, 5]]
    counts = torch.tensor([1.0, 2.0, 3.0, 0.0, 5.0, 4.0])
    assert prune(counts, pools_of(config), 2) == [[1], [2], [3], [4], [5]]
    assert reduced_config(config, 2) == replace(config, pools={"image": 2, "text": 1}, common_experts=2)
    assert pools_of(replace(config, common_experts=0)) == [[0, 1, 2], [3]]


def test_no_fewer_experts_than_a_token_gets() -> None:
    assert reduced_config(CONFIG, 2).num_experts == 2
    with pytest.raises(ValueError, match=r"keep: got 1 experts, allowed is 2 or more, as many as a token gets"):
        reduced_config(replace(CONFIG, router=replace(STILL, top_k=2)), 1)
    pooled = MoMELIMoEConfig(pools={"image": 2}, common_experts=0, router=replace(STILL, top_k=2))
    with pytest.raises(ValueError, match=r"ffn.pools: got 1 experts for image and 0 common ones, allowed is 2 or more"):
        reduced_config(pooled, 1)
    assert reduced_config(LIMoEConfig(num_experts=4, router=ExpertChoice()), 1).num_experts == 1
