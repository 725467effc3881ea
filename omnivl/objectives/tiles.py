"""Contrast of queries with keys by tiles: the matrix of their similarities never exists as a whole.

With logits ``l_ik = scale * q_i . k_k``, targets ``t_ik`` and weights ``w_ik`` (1 for positives) the loss of query i is

    loss_i = sum_k t_ik (z_i - l_ik),   z_i = log sum_k w_ik exp(l_ik)

The forward pass goes over tiles of the matrix and keeps sums by query, the backward pass computes each tile anew:
memory grows with the numbers of queries and of keys, not with their product. Keys of other replicas are joined where
that is little, and otherwise visit in a ring, block by block, with their gradients in the backward pass.

Shapes: B queries of this replica, R replicas, J = R * B keys of the joined batch, Q keys of a queue, n keys of a block,
P projection size, M embeddings of a sample that has several.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867; the ring as in Liu et al.,
    Ring attention, arXiv 2310.01889; tiles of a contrastive loss as in Cheng et al., Inf-CL, arXiv 2410.17243.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.gather import Gather
from omnivl.parts.similarity import similarity

Reduction = Literal["mean", "sum"]

RING_BYTES = 2**26
"""Joined keys of at most so many bytes are gathered at once; more of them visit in a ring."""

_TILE_ELEMENTS = {"cpu": 2**18}
_USUAL_TILE_ELEMENTS = 2**25
_TILE_ROWS = 2**9


class SpreadKeys:
    """The keys of a batch that is spread over replicas, of one modality."""

    def __init__(self, own: Tensor, identity: Tensor, gather: Gather, ring: bool | None = None) -> None:
        """Keys of this replica, and how to reach the others'.

        Args:
            own: fp32 ``[B, P]`` or ``[B, M, P]``, L2-normalised; equally many on every replica.
            identity: int64 ``[B]``.
            gather: The replicas.
            ring: Whether blocks go round; None: where joined keys are larger than ``RING_BYTES``.
        """
        self.own, self.gather, self._identity = own, gather, identity
        large = own.nbytes * gather.replicas > RING_BYTES
        self._in_ring = gather.replicas > 1 and (large if ring is None else ring)
        self._joined: KeyBlock | None = None

    @classmethod
    def both(
        cls, visual: Tensor, text: Tensor, identity: Tensor, gather: Gather, ring: bool | None = None
    ) -> tuple["SpreadKeys", "SpreadKeys"]:
        """Visual and textual keys of the same samples, whose identities are joined once."""
        keys = cls(visual, identity, gather, ring), cls(text, identity, gather, ring)
        if not any(one._in_ring for one in keys):
            joined = gather.join(identity)
            for one in keys:
                one._joined = KeyBlock(gather.join(one.own.detach()), joined, 0)
        return keys

    def joined(self) -> "KeyBlock":
        """The keys of all replicas at once. Called by every replica."""
        if self._joined is None:
            self._joined = KeyBlock(self.gather.join(self.own.detach()), self.gather.join(self._identity), 0)
        return self._joined

    @property
    def first(self) -> int:
        """Index of the first own key in the joined batch."""
        return self.gather.replica * len(self.own)

    @property
    def count(self) -> int:
        """J."""
        return self.gather.replicas * len(self.own)

    def blocks(self) -> Iterator["KeyBlock"]:
        """All keys, without gradient, each once. Called by every replica."""
        if not self._in_ring:
            yield self.joined()
            return
        own, gather = self.own.detach(), self.gather
        block = [own, self._identity]
        for hop in range(gather.replicas):
            arriving = gather.shift(block) if hop < gather.replicas - 1 else None
            yield KeyBlock(block[0], block[1], (gather.replica - hop) % gather.replicas * len(own))
            block = block if arriving is None else arriving()

    def sum_gradients(self, of_blocks: Iterator[Tensor]) -> Tensor:
        """The gradient of the own keys, summed over the replicas. Called by every replica.

        Args:
            of_blocks: This replica's part of the gradient of each block, in the order of ``blocks``.
        """
        if not self._in_ring:
            (gradient,) = of_blocks
            return self.gather.share_of_total(gradient)
        arriving: Callable[[], list[Tensor]] | None = None
        for gradient in of_blocks:
            if arriving is not None:
                gradient += arriving()[0]  # of the replicas that this block has visited before
            arriving = self.gather.shift([gradient])
        assert arriving is not None
        return arriving()[0]


@dataclass(frozen=True)
class OldKeys:
    """Keys without gradient that every replica has, of one modality: a queue.

    Attributes:
        keys: fp32 ``[Q, P]``.
        identity: int64 ``[Q]``.
        valid: Bool ``[Q]``; others do not exist.
        log_weights: Log of each key's weight as a negative ``[Q]``; None: all 1.
    """

    keys: Tensor
    identity: Tensor
    valid: Tensor
    log_weights: Tensor | None = None


@dataclass(frozen=True)
class Teacher:
    """The queries of the momentum model, fp32 ``[B, P]``, whose softmax over all keys is a part of the target.

    Attributes:
        query: The queries; no gradient.
        alpha: Share of the target, scalar.
    """

    query: Tensor
    alpha: Tensor


class Contrasted(NamedTuple):
    """Of each query ``[B]``: its loss, whether its nearest key of the batch has its identity, number of positives."""

    loss: Tensor
    nearest_is_positive: Tensor
    positives: Tensor


def softmax_contrast(
    query: Tensor,
    identity: Tensor,
    batch: SpreadKeys,
    scale: Tensor,
    *,
    reduction: Reduction = "mean",
    pairs_only: bool = False,
    label_smoothing: float = 0.0,
    log_weight: float | None = None,
    old: OldKeys | None = None,
    teacher: Teacher | None = None,
) -> Contrasted:
    """The softmax loss of each query over the keys of all replicas and of a queue. Called by every replica.

    The gradient of the own keys is summed over replicas: every replica's loss depends on every replica's keys. With
    gradients averaged over replicas the result equals one process that holds the joined batch.

    Args:
        query: fp32 ``[B, P]`` or ``[B, M, P]``, L2-normalised; equally many on every replica.
        identity: int64 ``[B]``. Valid keys of a query's identity are its positives.
        batch: The keys of the batch.
        scale: 1 / temperature, fp32 scalar.
        reduction: Whether the terms of a query's positives are averaged or summed. A query without one has none.
        pairs_only: The only positive of query i is key i of the same replica, whatever identities are.
        label_smoothing: Share of the target that is spread over all keys of the batch; without old keys and teacher.
        log_weight: Log of the weight of a negative of the batch; None: 0.
        old: Further keys.
        teacher: Soft targets: ``alpha * softmax(scale teacher.query . k) + (1 - alpha) * hard targets``.
    """
    assert label_smoothing == 0.0 or (old is None and teacher is None)
    assert not pairs_only or old is None
    problem = _Problem(identity, batch, reduction, pairs_only, label_smoothing, log_weight, old, teacher)
    made = _SoftmaxContrast.apply(query, batch.own, scale, problem)  # type: ignore[no-untyped-call]
    return Contrasted(*made)


@torch.no_grad()
def nearest_is_positive(query: Tensor, identity: Tensor, batch: SpreadKeys) -> Tensor:
    """Whether each query's nearest key of the batch has its identity, bool ``[B]``. Called by every replica."""
    nearest = _Nearest(query)
    for block in batch.blocks():
        for tile in _tiles(query, block):
            nearest.add(tile, similarity(query[tile.rows], tile.keys), block)
    return nearest.has(identity)


def sigmoid_contrast(query: Tensor, batch: SpreadKeys, scale: Tensor, bias: Tensor) -> Tensor:
    """``- sum_j log sigmoid(z_ij (scale q_i . k_j + bias))`` of each query ``[B]``, z 1 for its pair and -1 elsewhere.

    The pair of query i is key i of the same replica. Gradients as in ``softmax_contrast``. Called by every replica.

    As -log sigmoid(l) = softplus(l) - l and -log sigmoid(-l) = softplus(l), the sum is that of softplus over all logits
    minus the logit of the pair.

    Args:
        query: fp32 ``[B, P]`` or ``[B, M, P]``.
        batch: The keys.
        scale: fp32 scalar.
        bias: fp32 scalar.
    """
    made: Tensor = _SigmoidContrast.apply(query, batch.own, scale, bias, batch)  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True)
class KeyBlock:
    """Some keys, and what holds for all queries alike.

    Attributes:
        keys: ``[n, P]`` or ``[n, M, P]``.
        identity: int64 ``[n]``.
        first: Index of the first key in the joined batch; None for old keys.
        valid: Bool ``[n]``; None: all.
        log_weights: ``[n]``, or one for all; None: all 0.
    """

    keys: Tensor
    identity: Tensor
    first: int | None = None
    valid: Tensor | None = None
    log_weights: Tensor | float | None = None

    @property
    def places(self) -> Tensor:
        """Indices in the joined batch, int64 ``[n]``."""
        assert self.first is not None
        return torch.arange(self.first, self.first + len(self.keys), device=self.keys.device)


class _Tile:
    """The products of some queries and some keys of a block.

    Attributes:
        rows: The queries.
        columns: The keys within the block.
        keys: ``[n, P]`` or ``[n, M, P]``.
    """

    def __init__(self, block: KeyBlock, rows: slice, columns: slice) -> None:
        """Cuts the block's keys."""
        self.rows, self.columns, self._block = rows, columns, block
        self.keys = block.keys[columns]

    def positive(self, of_queries: Tensor, of_keys: Tensor) -> Tensor:
        """Bool: the key is valid and has the query's number.

        Args:
            of_queries: Numbers of all queries, ``[B]``.
            of_keys: Those of the block's keys, ``[n]``.
        """
        same = of_queries[self.rows, None] == of_keys[self.columns]
        return same if self._block.valid is None else same & self._block.valid[self.columns]

    def weighted(self, logits: Tensor, positive: Tensor | None) -> Tensor:
        """Logits of the normaliser; may be the given ones. ``positive`` may be None where all weights are 1."""
        if (weights := self._block.log_weights) is not None:
            assert positive is not None
            columns = weights[self.columns] if isinstance(weights, Tensor) else weights
            logits = torch.where(positive, logits, logits + columns)
        return self.allowed(logits)

    def allowed(self, logits: Tensor) -> Tensor:
        """Minus infinity where the key is not valid; may be the given ones."""
        if self._block.valid is None:
            return logits
        return logits.masked_fill(~self._block.valid[self.columns], float("-inf"))


def _tiles(query: Tensor, block: KeyBlock) -> Iterator[_Tile]:
    """The tiles of the queries with a block. A tile fits a CPU's cache, or is large enough for an accelerator."""
    several = (query.shape[1] if query.dim() == 3 else 1) * (block.keys.shape[1] if block.keys.dim() == 3 else 1)
    height = min(len(query), _TILE_ROWS) if query.device.type == "cpu" else len(query)
    width = max(1, _tile_elements(query) // (height * several))
    for left in range(0, len(block.keys), width):
        for top in range(0, len(query), height):
            yield _Tile(block, slice(top, top + height), slice(left, left + width))


def _tile_elements(query: Tensor) -> int:
    return _TILE_ELEMENTS.get(query.device.type, _USUAL_TILE_ELEMENTS)


def _add_gradients(of_products: Tensor, query: Tensor, keys: Tensor, of_query: Tensor, of_keys: Tensor | None) -> None:
    """Adds the gradients of queries and keys by that of ``similarity(query, keys)``."""
    if query.dim() == 3 or keys.dim() == 3:
        own, other = (one if one.dim() == 3 else one[:, None] for one in (query, keys))
        products = (own.flatten(0, 1) @ other.flatten(0, 1).t()).view(*own.shape[:2], *other.shape[:2])
        largest = products == products.amax((1, 3), keepdim=True)
        shares = of_products[:, None, :, None] * largest / largest.sum((1, 3), keepdim=True)
        of_products, query, keys = shares.flatten(2).flatten(0, 1), own.flatten(0, 1), other.flatten(0, 1)
        of_query = of_query.view(-1, of_query.shape[-1])
        of_keys = None if of_keys is None else of_keys.view(-1, of_keys.shape[-1])
    of_query.addmm_(of_products, keys)
    if of_keys is not None:
        of_keys.addmm_(of_products.t(), query)


class _LogSum:
    """``log sum_k exp(l_k)`` of each query, added up tile by tile; the mean of some values under that softmax too."""

    def __init__(self, query: Tensor) -> None:
        self._query, self._begun = query, False

    def add(self, rows: slice, logits: Tensor, values: Tensor | None = None) -> None:
        """Takes the logits of a tile, and overwrites them; ``values`` of the same shape are averaged."""
        # A row of minus infinities alone stays finite, so that its exponentials are 0.
        largest = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        if not self._begun and len(logits) == len(self._query):
            self._largest = largest
            self._sum, self._followed = _sums(logits, largest, values)
        else:
            if not self._begun:
                self._largest = self._query.new_full((len(self._query),), float("-inf"))
                self._sum, self._followed = torch.zeros_like(self._largest), torch.zeros_like(self._largest)
            if self._sum.dtype != torch.float64:  # many tiles would add up many roundings
                self._sum, self._followed = self._sum.double(), self._followed.double()
            before = self._largest[rows]
            largest = torch.maximum(largest, before)
            total, followed = _sums(logits, largest, values)
            shrunk = (before - largest).exp()
            self._sum[rows] = self._sum[rows] * shrunk + total
            if values is not None:
                self._followed[rows] = self._followed[rows] * shrunk + followed
            self._largest[rows] = largest
        self._begun = True

    def value(self) -> Tensor:
        """fp32 ``[B]``."""
        return self._largest + self._sum.log().float()

    def mean(self) -> Tensor:
        """The mean of the values, fp32 ``[B]``."""
        return (self._followed / self._sum).float()


def _sums(logits: Tensor, largest: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """By row the sum of the exponentials of what is below ``largest``, and that of these times values."""
    shares = logits.sub_(largest[:, None]).exp_()
    total = shares.sum(-1)
    return total, total if values is None else shares.mul_(values).sum(-1)


class _Nearest:
    """The nearest key of each query, the first of the joined batch where some are equally near."""

    def __init__(self, query: Tensor) -> None:
        self._query, self._begun = query, False

    def add(self, tile: _Tile, logits: Tensor, block: KeyBlock) -> None:
        """Takes the logits of a tile."""
        assert block.first is not None
        rows = tile.rows
        largest, column = logits.max(-1)
        index, found = column + (block.first + tile.columns.start), block.identity[tile.columns][column]
        if not self._begun and len(logits) == len(self._query):
            self._logit, self._index, self._identity = largest, index, found
        else:
            if not self._begun:
                self._logit = self._query.new_full((len(self._query),), float("-inf"))
                self._index, self._identity = (torch.zeros_like(self._logit, dtype=torch.int64) for _ in range(2))
            logit, before = self._logit[rows], self._index[rows]
            nearer = (largest > logit) | ((largest == logit) & (index < before))
            self._logit[rows] = torch.maximum(largest, logit)
            self._index[rows] = torch.where(nearer, index, before)
            self._identity[rows] = torch.where(nearer, found, self._identity[rows])
        self._begun = True

    def has(self, identity: Tensor) -> Tensor:
        """Whether it has the query's identity, bool ``[B]``."""
        return self._identity == identity


class _Groups:
    """Sums over the positives of each query within a block, by way of sums over keys of equal numbers.

    This takes as many operations as there are keys, where a mask takes as many as the matrix has elements, and more
    of them: it pays where a block has many tiles.
    """

    def __init__(self, block: KeyBlock, of_queries: Tensor, of_keys: Tensor) -> None:
        """Groups the keys by numbers that positives share; queries and keys have one embedding each."""
        self._block = block
        ordered = of_keys.sort().values
        self._of_key = torch.searchsorted(ordered, of_keys)
        self._of_query = torch.searchsorted(ordered, of_queries).clamp_(max=len(ordered) - 1)
        self._found = ordered[self._of_query] == of_queries

    def key_sums(self) -> Tensor:
        """The sum of each query's positives, ``[B, P]``."""
        return self._per_query(self._summed(self._of_key, self._valid(self._block.keys)))

    def counts(self) -> Tensor:
        """Their numbers, fp32 ``[B]``."""
        ones = torch.ones_like(self._of_key, dtype=torch.float32)
        return self._per_query(self._summed(self._of_key, self._valid(ones)))

    def sums_by_key(self, of_query: Tensor) -> Tensor:
        """For each key the sum of ``of_query [B, P]`` over the queries whose positive it is, ``[n, P]``."""
        found = of_query * self._found[:, None]
        return self._valid(self._summed(self._of_query, found)[self._of_key])

    def _valid(self, of_keys: Tensor) -> Tensor:
        if self._block.valid is None:
            return of_keys
        return of_keys * self._block.valid.view(-1, *[1] * (of_keys.dim() - 1))

    def _summed(self, group: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(len(self._of_key), *values.shape[1:]).index_add_(0, group, values)

    def _per_query(self, sums: Tensor) -> Tensor:
        return sums[self._of_query] * self._found.view(-1, *[1] * (sums.dim() - 1))


@dataclass(frozen=True)
class _Problem:
    """The arguments of ``softmax_contrast`` that have no gradient."""

    identity: Tensor
    batch: SpreadKeys
    reduction: Reduction
    pairs_only: bool
    smoothing: float
    log_weight: float | None
    old: OldKeys | None
    teacher: Teacher | None

    def batch_blocks(self) -> Iterator[KeyBlock]:
        """The blocks of the batch. Called by every replica."""
        for block in self.batch.blocks():
            yield replace(block, log_weights=self.log_weight)

    def old_blocks(self) -> Iterator[KeyBlock]:
        """The old keys, if there are any."""
        if (old := self.old) is not None:
            yield KeyBlock(old.keys, old.identity, None, old.valid, old.log_weights)

    def numbers(self, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """Numbers of queries ``[B]`` and of a block's keys ``[n]`` that are equal for positives."""
        if not self.pairs_only:
            return self.identity, block.identity
        first = self.batch.first
        return torch.arange(first, first + len(self.identity), device=self.identity.device), block.places

    def groups(self, block: KeyBlock, query: Tensor) -> _Groups | None:
        """The positives of a block by groups; None where a mask of each tile finds them."""
        large = len(query) * len(block.keys) > _tile_elements(query)
        plain = block.log_weights is None and query.dim() == block.keys.dim() == 2
        return _Groups(block, *self.numbers(block)) if plain and large else None

    def hard_share(self, counts: Tensor) -> Tensor:
        """The target's weight of each positive of the queries, ``[B]``, by the numbers of these."""
        each = (counts > 0) / counts.clamp(min=1) if self.reduction == "mean" else (counts > 0).float()
        return each * (1.0 - (self.smoothing if self.teacher is None else self.teacher.alpha))

    def target_sum(self, counts: Tensor) -> Tensor:
        """The sum of each query's targets, ``[B]``."""
        return self.hard_share(counts) * counts + (self.smoothing if self.teacher is None else self.teacher.alpha)


class _SoftmaxContrast(torch.autograd.Function):
    """``softmax_contrast``. Saves the queries and four figures of each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, own: Tensor, scale: Tensor, problem: _Problem) -> tuple[Tensor, ...]:
        teacher = problem.teacher
        scaled, taught = query * scale, None if teacher is None else teacher.query * scale
        normaliser, teacher_sum, nearest = _LogSum(query), _LogSum(query), _Nearest(query)
        positive, counts = query.new_zeros(len(query)), query.new_zeros(len(query))
        every = torch.zeros_like(positive) if problem.smoothing > 0 else None
        for block in chain(problem.batch_blocks(), problem.old_blocks()):
            if (groups := problem.groups(block, query)) is not None:
                positive += (groups.key_sums() * scaled).sum(-1)
                counts += groups.counts()
            for tile in _tiles(query, block):
                rows, logits, mask = tile.rows, similarity(scaled[tile.rows], tile.keys), None
                if block.first is not None:
                    nearest.add(tile, logits, block)
                if groups is None:
                    mask = tile.positive(*problem.numbers(block))
                    positive[rows] += torch.where(mask, logits, 0.0).sum(-1)
                    counts[rows] += mask.sum(-1)
                if taught is not None:
                    teacher_sum.add(rows, tile.allowed(similarity(taught[rows], tile.keys)), logits)
                if every is not None:
                    every[rows] += logits.sum(-1)
                normaliser.add(rows, tile.weighted(logits, mask))
        z = normaliser.value()
        hard, targets = problem.hard_share(counts), problem.target_sum(counts)
        followed = hard * positive
        if every is not None:
            followed = followed + problem.smoothing / problem.batch.count * every
        if teacher is not None:
            followed = followed + teacher.alpha * teacher_sum.mean()
        # A query without a target may have no key with a weight, hence no finite normaliser.
        loss = torch.where(targets > 0, targets * z - followed, 0.0)
        z = torch.where(targets > 0, z, 0.0)
        teacher_z = None if teacher is None else teacher_sum.value()
        ctx.save_for_backward(query, scale, z, teacher_z, hard, targets)
        ctx.problem = problem
        right = nearest.has(problem.identity)
        ctx.mark_non_differentiable(right, counts)
        return loss, right, counts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        query, scale, z, teacher_z, hard, targets = ctx.saved_tensors
        problem, teacher = ctx.problem, ctx.problem.teacher
        scaled, taught = query * scale, None if teacher is None else teacher.query * scale
        # By query: the factors of its softmax, of its positives and of its teacher's softmax in the logits' gradient.
        of_softmax, of_positive = gradients[0] * targets, gradients[0] * hard
        of_teacher = None if teacher is None else gradients[0] * teacher.alpha
        of_query = torch.zeros_like(query)  # without the factor scale, as those of keys

        def add(block: KeyBlock, of_keys: Tensor | None) -> None:
            groups = problem.groups(block, query)
            for tile in _tiles(query, block):
                rows, logits, mask = tile.rows, similarity(scaled[tile.rows], tile.keys), None
                if groups is None:
                    mask = tile.positive(*problem.numbers(block))
                shares = tile.weighted(logits, mask).sub_(z[rows, None]).exp_()
                of_logits = shares.mul_(of_softmax[rows, None])
                if taught is not None and of_teacher is not None:
                    soft = tile.allowed(similarity(taught[rows], tile.keys)).sub_(teacher_z[rows, None]).exp_()
                    of_logits -= soft.mul_(of_teacher[rows, None])
                if mask is not None:
                    of_logits -= torch.where(mask, of_positive[rows, None], 0.0)
                if problem.smoothing > 0:
                    of_logits -= gradients[0][rows, None] * (problem.smoothing / problem.batch.count)
                own = None if of_keys is None else of_keys[tile.columns]
                _add_gradients(of_logits, query[rows], tile.keys, of_query[rows], own)
            if groups is not None:
                of_query.sub_(groups.key_sums() * of_positive[:, None])
                if of_keys is not None:
                    of_keys -= groups.sums_by_key(query * of_positive[:, None])

        def of_batch() -> Iterator[Tensor]:
            for block in problem.batch_blocks():
                of_keys = torch.zeros_like(block.keys)
                add(block, of_keys)
                yield of_keys

        of_own: Tensor | None = None
        if ctx.needs_input_grad[1]:
            of_own = problem.batch.sum_gradients(of_batch()) * scale
        else:
            for block in problem.batch_blocks():
                add(block, None)
        for block in problem.old_blocks():
            add(block, None)
        return of_query * scale, of_own, (of_query * query).sum(), None


class _SigmoidContrast(torch.autograd.Function):
    """``sigmoid_contrast``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, own: Tensor, scale: Tensor, bias: Tensor, batch: SpreadKeys) -> Tensor:
        ctx.save_for_backward(query, own, scale, bias)
        ctx.batch = batch
        scaled = query * scale
        total = query.new_zeros(len(query), dtype=torch.float64)
        for block in batch.blocks():
            for tile in _tiles(query, block):
                logits = similarity(scaled[tile.rows], tile.keys).add_(bias)
                total[tile.rows] += F.softplus(logits).sum(-1, dtype=torch.float64)
        return (total - _pair_products(scaled, own) - bias).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        query, own, scale, bias = ctx.saved_tensors
        scaled, gradient = query * scale, gradients[0]
        of_query, of_bias = torch.zeros_like(query), gradient.new_zeros((), dtype=torch.float64)

        def of_block(block: KeyBlock) -> Tensor:
            of_keys = torch.zeros_like(block.keys)
            for tile in _tiles(query, block):
                rows = tile.rows
                of_logits = similarity(scaled[rows], tile.keys).add_(bias).sigmoid_().mul_(gradient[rows, None])
                of_bias.add_(of_logits.sum(dtype=torch.float64))
                _add_gradients(of_logits, query[rows], tile.keys, of_query[rows], of_keys[tile.columns])
            return of_keys

        of_own = ctx.batch.sum_gradients(of_block(block) for block in ctx.batch.blocks())
        with torch.enable_grad():
            pair = [one.detach().requires_grad_(True) for one in (query, own)]
            products = _pair_products(*pair)
        of_pair = torch.autograd.grad(products, pair, gradient)
        of_query -= of_pair[0]
        of_own -= of_pair[1]
        of_scale = (of_query * query).sum()
        return of_query * scale, of_own * scale, of_scale, (of_bias - gradient.sum()).float(), None


def _pair_products(query: Tensor, own: Tensor) -> Tensor:
    """The similarity of query i and key i, ``[B]``."""
    if query.dim() == own.dim() == 2:
        return (query * own).sum(-1)
    several = [one if one.dim() == 3 else one[:, None] for one in (query, own)]
    return (several[0] @ several[1].transpose(1, 2)).amax((1, 2))
