import pytest
import torch

from omnivl.tasks import ranking
from omnivl.tasks.ranking import Relevance, best_rank, chance_recall_at, ranks_both_ways, recall_at, recalls


def test_rank_of_the_best_relevant_candidate_worked_out_by_hand() -> None:
    # Query 0: order 2, 0, 1; relevant 0 -> one candidate before it. Query 1: relevant 1 and 2, of which 1 is first.
    similarity = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.8, 0.3]])
    relevant = torch.tensor([[True, False, False], [False, True, True]])
    assert best_rank(similarity, relevant).tolist() == [1, 0]
    assert recalls(similarity, relevant, (1, 2)) == {1: 0.5, 2: 1.0}


def test_a_collapsed_model_scores_nothing() -> None:
    similarity = torch.ones(4, 4)
    relevant = torch.eye(4, dtype=torch.bool)
    ranks = best_rank(similarity, relevant)
    assert ranks.tolist() == [3, 3, 3, 3]
    assert recall_at(ranks, 1) == 0.0


def test_chance_by_hand_and_by_simulation() -> None:
    # One relevant of four: 1/4 at 1, 2/4 at 2. Two relevant of four: 1 - (2/4)(1/3) = 5/6 at 2.
    one = torch.tensor([[True, False, False, False]])
    two = torch.tensor([[True, True, False, False]])
    assert chance_recall_at(one, 1) == pytest.approx(0.25)
    assert chance_recall_at(one, 2) == pytest.approx(0.5)
    assert chance_recall_at(two, 2) == pytest.approx(5 / 6)
    assert chance_recall_at(two, 4) == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    relevant = two.expand(20_000, 4)
    simulated = recalls(torch.rand(20_000, 4, generator=generator), relevant, (2,))[2]
    assert simulated == pytest.approx(5 / 6, abs=0.01)


def test_a_query_without_a_relevant_candidate_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="every query needs a relevant candidate"):
        best_rank(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("largest", [1, 40, 200, 1 << 24])
@pytest.mark.parametrize("queries", [1, 7, 60])
def test_blocks_rank_as_the_whole_matrix_does(monkeypatch: pytest.MonkeyPatch, largest: int, queries: int) -> None:
    monkeypatch.setattr(ranking, "LARGEST_BLOCK", largest)
    generator = torch.Generator().manual_seed(queries)
    columns = 20
    # Rounded, so that some candidates are equally similar.
    similarity = torch.randn(queries, columns, generator=generator).round(decimals=1)
    relevant = torch.rand(queries, columns, generator=generator) < 0.2
    relevant[torch.arange(columns) % queries, torch.arange(columns)] = True
    relevant[torch.arange(queries), torch.arange(queries) % columns] = True
    owned = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in relevant)
    asked = []

    def rows(part: slice) -> torch.Tensor:
        asked.append(part.stop - part.start)
        return similarity[part]

    relevance = Relevance(owned, columns)
    ours, others = ranks_both_ways(rows, relevance)
    assert torch.equal(ours, best_rank(similarity, relevant))
    assert torch.equal(others, best_rank(similarity.T, relevant.T))
    assert max(asked) <= max(1, largest // columns)
    assert sum(asked) == 2 * queries, "each row twice"
    assert torch.equal(relevance.counts()[0], relevant.sum(1))
    assert torch.equal(relevance.counts()[1], relevant.sum(0))


def test_similarities_that_are_no_numbers_score_nothing() -> None:
    assert best_rank(torch.full((2, 3), torch.nan), torch.eye(2, 3, dtype=torch.bool)).tolist() == [2, 2]
