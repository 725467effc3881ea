"""Text generation with the generation decoder: greedy and beam search, with or without a cache.

Shapes: B samples, T frames, H x W pixels, L text positions, K beams, R = B * K rows, l tokens so far, V vocabulary
size, S positions of the memory that the decoder attends to, D hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Writing
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.inference.written import looked_at, written_layout


class NextToken(Protocol):
    """Scores the possible next tokens of each row."""

    def __call__(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """Logits fp32 ``[R, V]``.

        Args:
            token_ids: int64 ``[R, l]``, all tokens so far.
            parents: int64 ``[R]``, the row of the previous call that each row continues; None at the first call.
        """


class ChainDecoder:
    """The generation stack of a chain as ``NextToken``."""

    def __init__(
        self,
        chain: Chain,
        objective: str,
        memory: Tensor,
        num_beams: int,
        cached: bool = True,
        memory_mask: Tensor | None = None,
    ) -> None:
        """Prepares decoding.

        Args:
            chain: The model.
            objective: Key of the objective whose head predicts the next token.
            memory: States that the decoder attends to, ``[B, S, D]``; see ``looked_at``.
            num_beams: K; rows of one sample are consecutive.
            cached: Whether to keep keys and values and feed new tokens only, instead of the whole text every time.
            memory_mask: bool ``[B, S]``, which positions of ``memory`` are not padding; None: all.
        """
        self.chain, self.objective, self.cached = chain, objective, cached
        self.rows = torch.arange(len(memory), device=memory.device).repeat_interleave(num_beams)
        self.given = {"memory": memory} | ({} if memory_mask is None else {"memory_mask": memory_mask})
        self.cache: dict[str, Tensor] = {}

    def __call__(self, token_ids: Tensor, parents: Tensor | None) -> Tensor:
        """See ``NextToken``."""
        start = token_ids.shape[1] - 1 if self.cache else 0
        if parents is not None:
            own = {name: kept.index_select(0, parents) for name, kept in self.cache.items() if name.endswith("/self")}
            self.cache = {**self.cache, **own}
        inputs = {
            **self.given,
            f"{self.objective}/token_ids": token_ids[:, start:],
            "cache/start": torch.tensor(start),
            "cache/rows": self.rows,
        }
        layout = written_layout(self.chain, self.objective, len(token_ids))
        state = self.chain.fold(State({**inputs, **self.cache}, layout))
        if self.cached:
            self.cache = {name: kept for name, kept in state.items() if name.endswith(("/self", "/cross"))}
        return state[f"{self.objective}/prediction"]


@dataclass(frozen=True)
class Generated:
    """Generated texts.

    Attributes:
        token_ids: int64 ``[B, max_length]``: the tokens after the start token, up to and including the end token,
            padded.
        log_probability: fp32 ``[B]``, of the whole text.
    """

    token_ids: Tensor
    log_probability: Tensor


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
        length_penalty: The best of the K texts maximises log probability / length ** length_penalty.
        prompt: Ids after the first token that are given as well.
    """

    start: int
    end: int
    pad: int
    banned: tuple[int, ...]
    max_length: int
    num_beams: int = 1
    length_penalty: float = 0.0
    prompt: tuple[int, ...] = ()


def writing_search(writing: Writing, num_beams: int = 1, length_penalty: float = 0.0) -> SearchOptions:
    """Search options for an objective's texts: special tokens other than the end are banned.

    Args:
        writing: How the objective generates texts.
        num_beams: 1 is greedy.
        length_penalty: See ``SearchOptions``.
    """
    special = writing.tokenizer.special
    banned = tuple(i for i in range(special.num_reserved) if i != writing.end)
    start, *prompt = writing.given
    length = writing.max_length
    return SearchOptions(
        start, writing.end, special.pad, banned, length, num_beams, length_penalty, prompt=tuple(prompt)
    )


def caption_search(
    tokens: SpecialTokens, max_length: int, num_beams: int = 1, length_penalty: float = 0.0
) -> SearchOptions:
    """Search options for captions: from the decoder's start token; special tokens other than the end are banned.

    Args:
        tokens: Special tokens of the tokenizer.
        max_length: Largest number of tokens to generate, end token included.
        num_beams: 1 is greedy.
        length_penalty: See ``SearchOptions``.
    """
    banned = tuple(i for i in range(tokens.num_reserved) if i != tokens.sep)
    return SearchOptions(tokens.decode, tokens.sep, tokens.pad, banned, max_length, num_beams, length_penalty)


def generate(
    chain: Chain,
    objective: str,
    frames: Tensor,
    options: SearchOptions,
    *,
    token_ids: Tensor | None = None,
    cached: bool = True,
    gather: Gather | None = None,
) -> Generated:
    """Generates a text for each image or clip.

    Args:
        chain: A chain with the objective's head.
        objective: Key of an objective that predicts the next token, such as ``lm``.
        frames: uint8 ``[B, T, 3, H, W]``; T = 1 for images.
        options: How to search.
        token_ids: int64 ``[B, L]``, a text for each image, such as a question, if the decoder attends to one.
        cached: Whether to keep keys and values between tokens; the result is the same.
        gather: For early stopping of all replicas together; see ``beam_search``.

    Raises:
        UserError: The chain has no such objective, or it predicts nothing, or the text that it attends to is missing.
    """
    with torch.no_grad():
        memory, mask = looked_at(chain, objective, frames, token_ids)
        decoder = ChainDecoder(chain, objective, memory, options.num_beams, cached, mask)
    return beam_search(decoder, len(frames), options, frames.device, gather)


@torch.no_grad()
def beam_search(
    next_token: NextToken, batch_size: int, options: SearchOptions, device: torch.device, gather: Gather | None = None
) -> Generated:
    """Keeps the K likeliest texts of each sample; finished ones stay among them.

    Args:
        next_token: Scores continuations.
        batch_size: B.
        options: See ``SearchOptions``.
        device: Where to search.
        gather: For stopping early once no replica has an unfinished text. None never stops early; if forward passes
            communicate, all replicas have to run equally many.
    """
    beams = options.num_beams
    given = torch.tensor((options.start, *options.prompt), device=device)
    texts = given.repeat(batch_size * beams, 1)
    # At the start only the first beam counts, since all beams are the same text.
    scores = torch.full((batch_size, beams), float("-inf"), device=device)
    scores[:, 0] = 0.0
    parents: Tensor | None = None
    for _ in range(options.max_length):
        steps = _step_scores(next_token(texts, parents), texts, options).view(batch_size, beams, -1)
        size = steps.shape[-1]
        scores, choice = (scores[..., None] + steps).flatten(1).topk(beams, dim=-1)
        first = torch.arange(batch_size, device=device)[:, None] * beams
        parents = (first + choice // size).flatten()
        texts = torch.cat([texts[parents], (choice % size).flatten()[:, None]], dim=1)
        if gather is not None and int(gather.total((~_finished(texts, options)).sum())) == 0:
            break
    texts = texts[:, len(given) :]
    texts = F.pad(texts, (0, options.max_length - texts.shape[1]), value=options.pad)
    texts = texts.view(batch_size, beams, -1)
    lengths = (texts != options.pad).sum(-1)
    best = (scores / lengths**options.length_penalty).argmax(-1)
    own = torch.arange(batch_size, device=device)
    return Generated(texts[own, best], scores[own, best])


def _finished(texts: Tensor, options: SearchOptions) -> Tensor:
    if texts.shape[1] == 1 + len(options.prompt):  # some tokenizers use one token as start and end
        return torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
    return (texts[:, -1] == options.end) | (texts[:, -1] == options.pad)


def _step_scores(logits: Tensor, texts: Tensor, options: SearchOptions) -> Tensor:
    """Log probabilities ``[R, V]`` of the next token; a finished text continues with padding of log probability 0."""
    banned = torch.tensor((*options.banned, options.pad), device=logits.device)
    scores = F.log_softmax(logits.float().index_fill(1, banned, float("-inf")), dim=-1)
    padding = torch.full_like(scores[:1], float("-inf"))
    padding[:, options.pad] = 0.0
    return torch.where(_finished(texts, options)[:, None], padding, scores)
