import warnings

import pytest
import torch

from moe.dispatch.by_token import Routing, arrange, capacity_of, combine, dispatch, expert_capacity
from moe.tokens import Segment, Tokens


def choices(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def check_one_to_one(routing: Routing) -> None:
    """Every choice has a row of its own, and the row names the token."""
    tokens, top_k = routing.place_TK.shape
    assert routing.place_TK.flatten().sort().values.tolist() == list(range(tokens * top_k))
    for token in range(tokens):
        assert routing.token_N[routing.place_TK[token]].tolist() == [token] * top_k


def test_tokens_are_sorted_by_expert_and_keep_their_order() -> None:
    # Tokens 0 to 3 choose experts 2, 0, 2, 1: expert 0 gets token 1, expert 1 token 3, expert 2 tokens 0 and 2.
    routing = arrange(choices([2], [0], [2], [1]), 3)
    assert routing.token_N.tolist() == [1, 3, 0, 2]
    assert routing.place_TK.tolist() == [[2], [0], [3], [1]]
    assert routing.tokens_per_expert_E.tolist() == [1, 1, 2]
    assert routing.kept_TK is None


def test_two_choices_of_a_token_have_two_rows() -> None:
    # Expert 0: token 0 (second choice), token 1 (first). Expert 1: token 1 (second). Expert 2: token 0 (first).
    routing = arrange(choices([2, 0], [0, 1]), 3)
    assert routing.token_N.tolist() == [0, 1, 1, 0]
    assert routing.place_TK.tolist() == [[3, 0], [1, 2]]
    assert routing.tokens_per_expert_E.tolist() == [2, 1, 1]
    check_one_to_one(routing)


def test_padding_goes_behind_all_experts() -> None:
    routing = arrange(choices([0], [1], [0], [1]), 2, valid_T=torch.tensor([True, False, True, True]))
    assert routing.token_N.tolist() == [0, 2, 3, 1]
    assert routing.tokens_per_expert_E.tolist() == [2, 1]
    assert routing.kept_TK is not None
    assert routing.kept_TK.tolist() == [[True], [False], [True], [True]]
    check_one_to_one(routing)


def test_above_capacity_the_later_tokens_are_dropped() -> None:
    # Expert 0 is chosen by tokens 0, 1 and 3 and serves two.
    routing = arrange(choices([0], [0], [1], [0]), 2, capacity=2)
    assert routing.kept_TK is not None
    assert routing.kept_TK.flatten().tolist() == [True, True, True, False]
    assert routing.token_N.tolist() == [0, 1, 2, 3]
    assert routing.tokens_per_expert_E.tolist() == [2, 1]


def test_priority_decides_who_is_dropped() -> None:
    routing = arrange(choices([0], [0], [1], [0]), 2, capacity=2, priority_T=torch.tensor([0.5, 0.9, 0.4, 0.8]))
    assert routing.kept_TK is not None
    assert routing.kept_TK.flatten().tolist() == [False, True, True, True]
    assert routing.token_N.tolist() == [1, 3, 2, 0]  # expert 0 by priority, then expert 1, then the dropped one
    check_one_to_one(routing)


def test_first_choices_come_before_second_ones() -> None:
    # Expert 1 is the second choice of token 0, whose priority is highest, and the first of token 1; it serves one.
    routing = arrange(choices([0, 1], [1, 2]), 3, capacity=1, priority_T=torch.tensor([0.9, 0.1]))
    assert routing.kept_TK is not None
    assert routing.kept_TK.tolist() == [[True, False], [True, True]]
    assert routing.tokens_per_expert_E.tolist() == [1, 1, 1]
    check_one_to_one(routing)


def test_padding_takes_no_capacity() -> None:
    valid = torch.tensor([False, True, True])
    routing = arrange(choices([0], [0], [0]), 1, capacity=2, valid_T=valid)
    assert routing.kept_TK is not None
    assert routing.kept_TK.flatten().tolist() == [False, True, True]


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_identical_experts_give_the_tokens_back(top_k: int, capacity: int | None) -> None:
    """Where experts change nothing, what is combined is each token times the gates of the choices that were served."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator)
    expert = torch.stack([torch.randperm(4, generator=generator)[:top_k] for _ in range(12)])
    gate = torch.rand(12, top_k, generator=generator)
    routing = arrange(expert, 4, capacity=capacity)
    served = torch.ones(12, top_k) if routing.kept_TK is None else routing.kept_TK.float()
    assert (served.sum() < 12 * top_k) == (capacity is not None)
    torch.testing.assert_close(combine(dispatch(x, routing), gate, routing), x * (gate * served).sum(1, keepdim=True))
    if top_k == 1 and capacity is None:
        assert torch.equal(combine(dispatch(x, routing), None, routing), x)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("capacity", [None, 2])
def test_gradients_are_those_of_plain_indexing(capacity: int | None, gated: bool) -> None:
    torch.manual_seed(0)
    expert = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    routing = arrange(expert, 3, capacity=capacity, valid_T=torch.arange(7) != 4)
    x, scale = torch.randn(7, 4, dtype=torch.double, requires_grad=True), torch.randn(14, 1, dtype=torch.double)
    gate = torch.rand(7, 2, dtype=torch.double, requires_grad=True) if gated else None
    assert routing.kept_TK is not None

    def plain() -> torch.Tensor:
        rows = x[routing.token_N] * scale
        weight = torch.ones(7, 2, dtype=torch.double) if gate is None else gate
        assert routing.kept_TK is not None
        return (rows[routing.place_TK] * (weight * routing.kept_TK)[..., None]).sum(1)

    inputs = [x] if gate is None else [x, gate]
    mine = combine(dispatch(x, routing) * scale, gate, routing)
    torch.testing.assert_close(mine, plain())
    upstream = torch.randn_like(mine)
    for ours, theirs in zip(
        torch.autograd.grad(mine, inputs, upstream), torch.autograd.grad(plain(), inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_lies_in_the_rows_of_no_expert_is_not_read() -> None:
    routing = arrange(choices([0], [0], [1]), 2, valid_T=torch.tensor([True, False, True]))
    rows = torch.tensor([[1.0], [2.0], [torch.nan]], requires_grad=True)
    y = combine(rows, torch.ones(3, 1), routing)
    assert y.flatten().tolist() == [1.0, 0.0, 2.0]
    y.sum().backward()
    assert rows.grad is not None
    assert rows.grad.flatten().tolist() == [1.0, 1.0, 0.0]


def test_capacity_is_rounded_up_and_says_so() -> None:
    # 10 tokens, top-1, factor 1.05, 2 experts: 10 * 1.05 / 2 = 5.25, up to 6, up to 8: a factor of 8 * 2 / 10.
    with pytest.warns(UserWarning, match="capacity of 2 experts for 10 tokens") as caught:
        assert expert_capacity(10, 2, 1, 1.05) == 8
    assert str(caught[0].message) == (
        "capacity of 2 experts for 10 tokens: factor 1.05 asked, 1.6 used (rounded up from 6 to 8 tokens per expert)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expert_capacity(16, 4, 2, 1.0) == 8  # 16 * 2 / 4, a multiple of 4 already


@pytest.mark.filterwarnings("ignore:capacity of")
def test_padding_does_not_count_for_the_capacity():
    for tokens, experts, top_k, factor in [(10, 2, 1, 1.05), (16, 4, 2, 1.0), (97, 8, 1, 0.7), (1000, 3, 2, 1.25)]:
        valid = torch.arange(2 * tokens) % 2 == 0
        assert capacity_of(valid, experts, top_k, factor) == expert_capacity(tokens, experts, top_k, factor)


def test_segments_say_the_modality_of_every_token() -> None:
    tokens = Tokens((Segment("text", 2), Segment("image", 3, fused=True)))
    assert tokens.count == 5
    assert tokens.modality_ids(("image", "video", "text"), torch.device("cpu")).tolist() == [2, 2, 0, 0, 0]
    valid = torch.tensor([[True, False], [True, True]])
    whole = Tokens.of("text", torch.zeros(2, 2, 8), valid)
    assert whole.segments == (Segment("text", 4),)
    assert whole.valid is not None
    assert whole.valid.tolist() == [True, False, True, True]
