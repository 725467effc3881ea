"""Greedy and beam search over any model that scores the next token.

Shapes: B samples, K beams, R = B * K rows, l tokens so far, V vocabulary size.

Source: ``generate`` of transformers 5 with its default stopping rule (``early_stopping=False``), whose texts the search
    returns for every length penalty, least length and repetition penalty; vectorised in the same way.
Differs: tokens that are never generated are taken out before the softmax, not after it.
"""

from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.gather import Gather
from omnivl.errors import UserError

_NEVER = -1.0e9
"""Score of what must not be chosen, but is finite so that sums of it have an order."""


class NextToken(Protocol):
    """Scores the possible next tokens of each row."""

    def __call__(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """Logits fp32 ``[R, V]``.

        Args:
            token_ids: int64 ``[R, l]``, all tokens so far.
            parents: int64 ``[R]``, the row of the previous call that each row continues; None at the first call.
        """


@dataclass(frozen=True)
class Generated:
    """Generated texts.

    Attributes:
        token_ids: int64 ``[B, max_length]``: the tokens after the start token, up to and including the end token,
            padded.
        log_probability: fp32 ``[B]``, of the whole text; with a repetition penalty, the sum of what it makes of them.
    """

    token_ids: Tensor
    log_probability: Tensor


class Choice(TypedDict, total=False):
    """Which of the likely texts a search takes, beside the number of beams: options of ``SearchOptions``."""

    length_penalty: float
    min_length: int
    repetition_penalty: float


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        start: Id of the first token, which is given, not generated.
        end: Id of the token that ends a text.
        pad: Id that pads finished texts.
        banned: Ids that are never generated.
        max_length: Largest number of tokens to generate, end token included.
        num_beams: K; 1 is greedy.
        length_penalty: Of finished texts the one is chosen that maximises log probability / length ** length_penalty,
            and longer ones are sought until the best unfinished text, at its present length, is behind all K finished
            ones.
        prompt: Ids after the first token that are given as well.
        min_length: Smallest number of tokens before the end token.
        repetition_penalty: Above 1, tokens that the text has already are less likely: their negative log probabilities
            are multiplied by it (greedy: their logits are, or are divided by it if positive).
    """

    start: int
    end: int
    pad: int
    banned: tuple[int, ...]
    max_length: int
    num_beams: int = 1
    length_penalty: float = 0.0
    prompt: tuple[int, ...] = ()
    min_length: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: One is outside of its range.
        """
        for name, value, allowed, fits in (
            ("num_beams", self.num_beams, "1 or more", self.num_beams >= 1),
            ("max_length", self.max_length, "1 or more", self.max_length >= 1),
            ("min_length", self.min_length, f"0 to {self.max_length}", 0 <= self.min_length <= self.max_length),
            ("length_penalty", self.length_penalty, "-100 to 100", -100 <= self.length_penalty <= 100),
            ("repetition_penalty", self.repetition_penalty, "above 0, up to 100", 0 < self.repetition_penalty <= 100),
        ):
            if not fits:
                raise UserError(f"generate: {name}: got {value}; allowed {allowed}; change it")

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that a text begins with."""
        return (self.start, *self.prompt)


@torch.no_grad()
def beam_search(
    next_token: NextToken, batch_size: int, options: SearchOptions, device: torch.device, gather: Gather | None = None
) -> Generated:
    """Finds a likely text for each sample.

    Args:
        next_token: Scores continuations.
        batch_size: B.
        options: See ``SearchOptions``.
        device: Where to search.
        gather: For stopping early once no replica can find better texts. None never stops early; if forward passes
            communicate, all replicas have to run equally many.
    """
    search = _Greedy if options.num_beams == 1 else _Beams
    state = search(batch_size, options, device)
    parents: Tensor | None = None
    for length in range(1, options.max_length + 1):
        parents = state.step(next_token(state.texts, parents), length)
        if gather is not None and int(gather.total(state.open.sum())) == 0:
            break
    return state.found()


class _Greedy:
    """The likeliest next token, until the end."""

    def __init__(self, batch_size: int, options: SearchOptions, device: torch.device) -> None:
        self.options = options
        self.texts = torch.tensor(options.given, device=device).repeat(batch_size, 1)
        self.sums = torch.zeros(batch_size, device=device)
        self.open = torch.ones(batch_size, dtype=torch.bool, device=device)
        self._rows = torch.arange(batch_size, device=device)

    def step(self, logits: Tensor, length: int) -> Tensor:
        """Appends the ``length``-th token; returns the row that each row continues."""
        options = self.options
        scores = F.log_softmax(_ruled(_possible(logits, options), self.texts, length, options), dim=-1)
        best, token = scores.max(dim=-1)
        token = torch.where(self.open, token, options.pad)
        self.sums = self.sums + torch.where(self.open, best, 0.0)
        self.texts = torch.cat([self.texts, token[:, None]], dim=1)
        self.open = self.open & (token != options.end)
        return self._rows

    def found(self) -> Generated:
        """The texts."""
        generated = self.texts[:, len(self.options.given) :]
        missing = self.options.max_length - generated.shape[1]
        return Generated(F.pad(generated, (0, missing), value=self.options.pad), self.sums)


class _Beams:
    """K unfinished texts of each sample that go on, beside the K best finished ones."""

    def __init__(self, batch_size: int, options: SearchOptions, device: torch.device) -> None:
        beams = options.num_beams
        self.options, self._size = options, (batch_size, beams)
        self.texts = torch.tensor(options.given, device=device).repeat(batch_size * beams, 1)
        # At the start only the first beam counts, since all beams are the same text.
        self.sums = torch.full(self._size, _NEVER, device=device)
        self.sums[:, 0] = 0.0
        self.open = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
        self._first = torch.arange(batch_size, device=device)[:, None] * beams
        self._done = torch.full((*self._size, options.max_length), options.pad, device=device)
        self._done_sums = torch.zeros(self._size, device=device)
        self._done_scores = torch.full(self._size, _NEVER, device=device)
        self._is_done = torch.zeros(self._size, dtype=torch.bool, device=device)

    def step(self, logits: Tensor, length: int) -> Tensor:
        """Appends the ``length``-th token; returns the row that each row continues."""
        options, (batch_size, beams) = self.options, self._size
        steps = _ruled(F.log_softmax(_possible(logits, options), dim=-1), self.texts, length, options)
        size = steps.shape[-1]
        # Twice as many as go on: all of the first K may end.
        sums, choice = (self.sums[..., None] + steps.view(batch_size, beams, size)).flatten(1).topk(2 * beams, dim=1)
        parents, tokens = self._first + choice // size, choice % size
        ends = (tokens == options.end) | (length == options.max_length)
        self._finish(sums, parents, tokens, ends, length)
        self.sums, going = torch.where(ends, sums + _NEVER, sums).topk(beams, dim=1)
        rows = parents.gather(1, going).flatten()
        self.texts = torch.cat([self.texts[rows], tokens.gather(1, going).view(-1, 1)], dim=1)
        worst = torch.where(self._is_done, self._done_scores.amin(1, keepdim=True), _NEVER)
        self.open = self.open & (self.sums[:, :1] / length**options.length_penalty > worst).any(1, keepdim=True)
        return rows

    def _finish(self, sums: Tensor, parents: Tensor, tokens: Tensor, ends: Tensor, length: int) -> None:
        """Keeps the best of the finished texts and of those of the first K candidates that end now."""
        options, (batch_size, beams) = self.options, self._size
        now = ends & (torch.arange(2 * beams, device=ends.device) < beams)
        scores = sums / length**options.length_penalty + (~self.open) * _NEVER + (~now) * _NEVER
        before = self.texts[parents.flatten(), len(options.given) :].view(batch_size, 2 * beams, -1)
        texts = F.pad(torch.cat([before, tokens[..., None]], -1), (0, options.max_length - length), value=options.pad)
        self._done_scores, best = torch.cat([self._done_scores, scores], 1).topk(beams, dim=1)
        self._done = torch.cat([self._done, texts], 1).gather(1, best[..., None].expand(-1, -1, options.max_length))
        self._done_sums = torch.cat([self._done_sums, sums], 1).gather(1, best)
        self._is_done = torch.cat([self._is_done, now], 1).gather(1, best)

    def found(self) -> Generated:
        """The best text of each sample."""
        return Generated(self._done[:, 0], self._done_sums[:, 0])


def _possible(logits: Tensor, options: SearchOptions) -> Tensor:
    """Logits fp32 ``[R, V]`` without those of tokens that are never generated."""
    banned = [token for token in (*options.banned, options.pad) if token != options.end]
    return logits.float().index_fill(1, torch.tensor(banned, dtype=torch.long, device=logits.device), float("-inf"))


def _ruled(scores: Tensor, texts: Tensor, length: int, options: SearchOptions) -> Tensor:
    """Scores ``[R, V]`` of the ``length``-th token after the penalty for repetition, and without an early end."""
    if options.repetition_penalty != 1.0:
        own = scores.gather(1, texts)
        penalty = options.repetition_penalty
        scores = scores.scatter(1, texts, torch.where(own < 0, own * penalty, own / penalty))
    if length <= options.min_length:
        scores = scores.index_fill(1, torch.tensor([options.end], device=scores.device), float("-inf"))
    return scores
