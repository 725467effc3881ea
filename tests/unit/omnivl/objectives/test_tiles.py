"""Contrast by tiles: by hand, and against the formulas on the whole matrix, values and gradients."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_contrast import Dense, sigmoid_loss
from torch import Tensor

from omnivl.chain.gather import LocalGather
from omnivl.objectives import key_sums, positives, tile_sums, tiles
from omnivl.objectives.contrast import (
    Contrasted,
    Teacher,
    nearest_is_positive,
    pair_contrast,
    sigmoid_contrast,
    softmax_contrast,
)
from omnivl.objectives.spread_keys import KeyBlock, OldKeys, SpreadKeys
from omnivl.objectives.tile_sums import Matrix, Sums, merged
from omnivl.objectives.tiles import Tile
from omnivl.parts.similarity import similarity

LN2, LN3 = math.log(2), math.log(3)


@pytest.fixture(params=[None, 48], ids=["one tile", "many tiles"], autouse=True)
def _tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test by one tile and by tiles that divide neither queries nor keys."""
    if request.param is not None:
        monkeypatch.setitem(tiles._TILE_ELEMENTS, "cpu", request.param)
        monkeypatch.setattr(tiles, "_TILE_ROWS", 8)


@pytest.fixture(params=[True, False], ids=["host sees", "host waits"], autouse=True)
def _host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test as on a CPU, and by the operations of an accelerator, whose values the host does not look at."""
    if not request.param:
        for module in (tiles, tile_sums, key_sums, positives):
            monkeypatch.setattr(module, "host_sees", lambda tensor: False)


def spread(keys: Tensor, identity: Tensor) -> SpreadKeys:
    return SpreadKeys(keys, identity, LocalGather())


def one_query(positive: list[bool], **options: Any) -> tuple[float, list[float]]:
    """Loss of one query whose three logits are ln 2, 0, 0, and its gradient by the logits.

    The three keys are old ones, beside a key of the batch that does not count. Only the first component of a key meets
    the query, so that its gradient is that of the logit, times the scale ln 2.
    """
    query, old = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    identity = torch.tensor([7 if same else 8 + place for place, same in enumerate(positive)])
    valid = options.pop("valid", torch.ones(3, dtype=torch.bool))
    weights = options.pop("log_weights", torch.zeros(3))
    scale = torch.tensor(LN2)
    shift = torch.zeros(1, 2, requires_grad=True)
    gradients = []
    loss = 0.0
    for place in range(3):  # by each key in turn as the one with a gradient, which is that of the batch
        others = [k for k in range(3) if k != place]
        rest = OldKeys(old[others], identity[others], valid[others], weights[others])
        if not valid[place]:
            gradients.append(0.0)
            continue
        made = softmax_contrast(
            query,
            torch.tensor([7]),
            spread(old[place : place + 1] + shift, identity[place : place + 1]),
            scale,
            old=rest,
            log_weight=weights[place].item(),
            **options,
        )
        (gradient,) = torch.autograd.grad(made.loss.sum(), shift)
        gradients.append(gradient[0, 0].item() / LN2)
        loss = made.loss.item()
    return loss, gradients


def test_one_positive_by_hand() -> None:
    # ln(2 + 1 + 1) - ln 2 = ln 2. Gradient: softmax (1/2, 1/4, 1/4) minus the target (1, 0, 0).
    loss, gradient = one_query([True, False, False])
    assert loss == pytest.approx(LN2)
    assert gradient == pytest.approx([-0.5, 0.25, 0.25])


def test_two_positives_by_hand() -> None:
    # Terms ln 4 - ln 2 = ln 2 and ln 4 - 0 = 2 ln 2. Mean 1.5 ln 2, sum 3 ln 2.
    # Gradients: (1/2, 1/4, 1/4) - (1/2, 1/2, 0), and 2 (1/2, 1/4, 1/4) - (1, 1, 0).
    loss, gradient = one_query([True, True, False])
    assert loss == pytest.approx(1.5 * LN2)
    assert gradient == pytest.approx([0.0, -0.25, 0.25], abs=1e-7)
    loss, gradient = one_query([True, True, False], reduction="sum")
    assert loss == pytest.approx(3 * LN2)
    assert gradient == pytest.approx([0.0, -0.5, 0.5], abs=1e-7)


def test_weighted_negatives_by_hand() -> None:
    # The third key counts three times, the first two as positives once: ln(2 + 1 + 3) = ln 6.
    # Mean of ln 6 - ln 2 and ln 6. Gradient: (2, 1, 3) / 6 - (1/2, 1/2, 0).
    loss, gradient = one_query([True, True, False], log_weights=torch.tensor([5.0, 7.0, 3.0]).log())
    assert loss == pytest.approx(math.log(6) - LN2 / 2)
    assert gradient == pytest.approx([1 / 3 - 1 / 2, 1 / 6 - 1 / 2, 1 / 2])


def test_negatives_of_weight_zero_and_invalid_keys_are_left_out() -> None:
    # ln(2 + 1) - ln 2 either way; no gradient at the key that is left out.
    loss, gradient = one_query([True, False, False], log_weights=torch.tensor([1.0, 1.0, 0.0]).log())
    assert loss == pytest.approx(LN3 - LN2)
    assert gradient == pytest.approx([-1 / 3, 1 / 3, 0.0])
    loss, gradient = one_query([True, False, False], valid=torch.tensor([True, True, False]))
    assert loss == pytest.approx(LN3 - LN2)
    assert gradient == pytest.approx([-1 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("log_weights", [torch.zeros(3), torch.full((3,), float("-inf"))], ids=["1", "0"])
def test_a_query_without_positive_contributes_nothing(log_weights: Tensor) -> None:
    """Also where its negatives have no weight, so that there is nothing to divide by."""
    loss, gradient = one_query([False, False, False], log_weights=log_weights)
    assert loss == 0.0
    assert gradient == [0.0, 0.0, 0.0]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@dataclass(frozen=True)
class Side:
    """Queries of one direction with all their keys, those of the batch first, and the ones of a queue among them."""

    query: Tensor
    own: Tensor
    old: OldKeys | None

    def dense(self, identity: Tensor, scale: Tensor, log_weight: float | None, *, pairs: bool, **options: Any) -> Dense:
        """The same for the formulas."""
        count, keys, valid, identities = len(identity), self.own, torch.ones(len(identity), dtype=torch.bool), identity
        weights = torch.full((count,), 0.0 if log_weight is None else log_weight)
        if (old := self.old) is not None:
            keys, valid = torch.cat([keys, old.keys]), torch.cat([valid, old.valid])
            identities = torch.cat([identities, old.identity])
            weights = torch.cat([weights, torch.zeros(len(old.keys)) if old.log_weights is None else old.log_weights])
        same = (identity[:, None] == identities) & valid
        positive = torch.eye(count, dtype=torch.bool) if pairs else same
        return Dense(self.query, keys, scale, positive, valid, weights, options)


def embedded(count: int, several: int, size: int = 6) -> Tensor:
    return unit(count, several, size) if several else unit(count, size)


def old_keys(count: int, several: int, identities: int, *, weighted: bool) -> OldKeys:
    weights = torch.cat([torch.tensor([float("-inf")]), torch.randn(count - 1)]) if weighted else None
    numbers, valid = torch.randint(0, identities, (count,)), torch.rand(count) < 0.6
    return OldKeys(embedded(count, several), numbers, valid, weights)


def check(got: list[Contrasted], dense: list[Dense], inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients against the formulas."""
    pulls = [torch.randn(len(one.loss)) for one in got]
    for one, other in zip(got, dense, strict=True):
        torch.testing.assert_close(one.loss.double(), other.loss(), atol=2e-6, rtol=1e-6)
        assert one.positives.tolist() == other.positive.sum(-1).tolist()
    made = torch.autograd.grad(sum((one.loss * pull).sum() for one, pull in zip(got, pulls, strict=True)), inputs)
    wanted = sum((one.loss() * pull).sum() for one, pull in zip(dense, pulls, strict=True))
    for one, other, size in zip(made, torch.autograd.grad(wanted, inputs), (1.0, 1.0, 10.0), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6 * size * other.abs().max().clamp(min=1).item(), rtol=2e-6)


def compare(
    *,
    old: int = 0,
    of_query: int = 0,
    of_key: int = 0,
    weighted: bool = False,
    taught: bool = False,
    reduction: str = "mean",
) -> None:
    """One direction. ``of_query`` and ``of_key`` are the embeddings of each, 0 for one."""
    torch.manual_seed(0)
    query, own = embedded(19, of_query).requires_grad_(), embedded(19, of_key).requires_grad_()
    scale, identity = torch.tensor(9.0, requires_grad=True), torch.randint(0, 5, (19,))
    log_weight = -0.7 if weighted else None
    older = old_keys(old, of_key, 5, weighted=weighted) if old else None
    teacher = embedded(19, of_query) if taught else None
    options = {"teacher": teacher, "alpha": 0.4} if taught else {}
    got = softmax_contrast(
        *(query, identity, spread(own, identity), scale),
        reduction=reduction,
        old=older,
        teacher=None if teacher is None else Teacher(teacher, torch.tensor(0.4)),
        log_weight=log_weight,
    )
    dense = Side(query, own, older).dense(identity, scale, log_weight, pairs=False, reduction=reduction, **options)
    check([got], [dense], (query, own, scale))


def compare_pairs(
    *,
    old: int = 0,
    identities: int = 5,
    of_visual: int = 0,
    of_text: int = 0,
    weighted: bool = False,
    pairs_only: bool = False,
    scale: float = 9.0,
    **options: Any,
) -> None:
    """Both directions of pairs, whose embeddings are queries and keys."""
    torch.manual_seed(0)
    visual, text = (embedded(19, several).requires_grad_() for several in (of_visual, of_text))
    factor, identity = torch.tensor(scale, requires_grad=True), torch.randint(0, identities, (19,))
    log_weight = -0.7 if weighted else None
    olds = [old_keys(old, several, identities, weighted=weighted) if old else None for several in (of_visual, of_text)]
    got = pair_contrast(
        *(spread(visual, identity), spread(text, identity), factor),
        pairs_only=pairs_only,
        log_weight=log_weight,
        old=(olds[0], olds[1]) if old else None,
        **options,
    )
    sides = [Side(visual, text, olds[1]), Side(text, visual, olds[0])]
    dense = [side.dense(identity, factor, log_weight, pairs=pairs_only, **options) for side in sides]
    check(list(got), dense, (visual, text, factor))
    for side, keys in ((got[0], dense[0]), (got[1], dense[1])):
        nearest = identity[similarity(keys.query.double(), keys.keys[:19].double()).argmax(-1)]
        assert side.nearest_is_positive.tolist() == (nearest == identity).tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("old", "weighted", "taught"), list(itertools.product((0, 23), (False, True), (False, True))))
def test_tiles_are_the_formula(old: int, weighted: bool, taught: bool, reduction: str) -> None:
    compare(old=old, weighted=weighted, taught=taught, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("old", "weighted"), list(itertools.product((0, 23), (False, True))))
def test_tiles_of_both_directions_are_the_formula(old: int, weighted: bool, reduction: str) -> None:
    compare_pairs(old=old, weighted=weighted, reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_whose_powers_do_not_fit(weighted: bool) -> None:
    """Each row and column of a tile then has an exponent of its own."""
    compare_pairs(scale=300.0, weighted=weighted)


@pytest.mark.parametrize(("of_query", "of_key"), [(3, 0), (0, 3), (2, 3)])
def test_samples_with_several_embeddings(of_query: int, of_key: int) -> None:
    compare(of_query=of_query, of_key=of_key)
    compare(of_query=of_query, of_key=of_key, old=7, weighted=True, taught=True)
    compare_pairs(of_visual=of_query, of_text=of_key)
    compare_pairs(of_visual=of_query, of_text=of_key, old=7, weighted=True)


@pytest.mark.parametrize("of_visual", [0, 3])
def test_pairs_only_and_smoothed_labels(of_visual: int) -> None:
    compare_pairs(pairs_only=True, of_visual=of_visual)
    compare_pairs(pairs_only=True, label_smoothing=0.1, of_visual=of_visual)


def test_every_identity_is_its_own_and_all_are_one() -> None:
    compare_pairs(identities=10**9)
    compare_pairs(identities=1, old=5)


@pytest.mark.parametrize(("of_query", "of_key"), [(0, 0), (3, 0), (0, 3)])
def test_sigmoid_tiles_are_the_formula(of_query: int, of_key: int) -> None:
    torch.manual_seed(0)
    query, own = (unit(19, several, 6) if several else unit(19, 6) for several in (of_query, of_key))
    inputs = [query.requires_grad_(), own.requires_grad_()]
    inputs += [torch.tensor(value, requires_grad=True) for value in (10.0, -10.0)]
    got, nearest = sigmoid_contrast(spread(query, torch.arange(19)), spread(own, torch.arange(19)), *inputs[2:])
    products = similarity(query.double(), own.double())
    assert nearest.of_visual.tolist() == (products.argmax(1) == torch.arange(19)).tolist()
    assert nearest.of_text.tolist() == (products.argmax(0) == torch.arange(19)).tolist()
    wanted, pull = sigmoid_loss(*inputs), torch.randn(19)
    torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=1e-6)
    made = torch.autograd.grad((got * pull).sum(), inputs)
    for one, other in zip(made, torch.autograd.grad((wanted * pull).sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-6)


def test_the_nearest_key_is_the_first_of_equals() -> None:
    """Samples 7, 8 and 12, which the small tiles part, are equal: only the first finds itself."""
    keys, identity = torch.eye(27)[[*range(8), 7, *range(9, 12), 7, *range(13, 27)]], torch.arange(27)
    for side in nearest_is_positive(spread(keys, identity), spread(keys, identity)):
        assert [place for place, right in enumerate(side.tolist()) if not right] == [8, 12]


def test_sums_of_several_replicas_merge() -> None:
    """Each has some of the keys: of one their powers fit as they are, of the others not."""
    torch.manual_seed(0)
    logits, identity, found = torch.randn(5, 12) * torch.tensor([3.0, 150.0, 150.0]).repeat_interleave(4), 70, []
    logits[:2, 9] = logits[:2, 5] = 400.0  # equally near: the first counts, whoever comes first
    of_keys = torch.arange(12)
    of_keys[5] = identity
    for first in (8, 4, 0):
        sums, part = Sums(5), logits[:, first : first + 4]
        matrix, keys = Matrix(sums, None), torch.empty(4, 1)
        block = KeyBlock(keys, of_keys[first : first + 4], first)
        tile = Tile(block, slice(0, 5), slice(0, 4), keys)
        largest = matrix.largest(tile, part, places=True)
        matrix.meet(tile, part, largest, torch.full((5,), identity), 0, block)
        matrix.add_powers(tile, part.clone(), largest)
        found.append(sums.packed(logits))
    whole = Sums.unpacked(merged(torch.stack(found)))
    torch.testing.assert_close(whole.log_sum.value(logits), (logits.double() * LN2).logsumexp(1) / LN2)
    assert whole.nearest.place.tolist() == [2 * key + (key == 5) for key in logits.argmax(1).tolist()]
    assert whole.nearest.has_identity(logits)[:2].tolist() == [True, True]


def test_the_matrix_is_never_kept() -> None:
    """What the backward pass needs grows with the queries and keys, not with their product."""
    kept = []
    for count in (64, 128):
        query, own = unit(count, 6).requires_grad_(), unit(count, 6).requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            pair_contrast(spread(query, torch.arange(count)), spread(own, torch.arange(count)), torch.tensor(3.0))
        kept.append(sum(sizes))
    assert kept[1] < 2.01 * kept[0], kept
