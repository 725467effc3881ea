"""Text generation with the generation decoder, with or without a cache.

Shapes: B samples, T frames, H x W pixels, L text positions, S positions of the memory that the decoder attends to, D
hidden size.
"""

from typing import Unpack

import torch
from torch import Tensor

from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Writing
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.inference.search import Choice, Generated, SearchOptions, beam_search
from omnivl.inference.written import looked_at, written_layout


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


def writing_search(
    writing: Writing, num_beams: int = 1, max_length: int | None = None, **choice: Unpack[Choice]
) -> SearchOptions:
    """Search options for an objective's texts: special tokens other than the end are banned.

    Args:
        writing: How the objective generates texts.
        num_beams: 1 is greedy.
        max_length: Largest number of tokens to generate, end token included, if it is less than there is room for.
        choice: See ``SearchOptions``.

    Raises:
        UserError: A number is outside of its range.
    """
    most = writing.max_length if max_length is None else min(max_length, writing.max_length)
    start, *prompt = writing.given
    tokens = writing.tokenizer.special
    banned = _banned(tokens, writing.end)
    return SearchOptions(start, writing.end, tokens.pad, banned, most, num_beams, prompt=tuple(prompt), **choice)


def caption_search(
    tokens: SpecialTokens, max_length: int, num_beams: int = 1, **choice: Unpack[Choice]
) -> SearchOptions:
    """Search options for captions: from the decoder's start token; special tokens other than the end are banned.

    Args:
        tokens: Special tokens of the tokenizer.
        max_length: Largest number of tokens to generate, end token included.
        num_beams: 1 is greedy.
        choice: See ``SearchOptions``.

    Raises:
        UserError: A number is outside of its range.
    """
    return SearchOptions(
        tokens.decode, tokens.sep, tokens.pad, _banned(tokens, tokens.sep), max_length, num_beams, **choice
    )


def _banned(tokens: SpecialTokens, end: int) -> tuple[int, ...]:
    return tuple(one for one in range(tokens.num_reserved) if one != end)


def generate(
    chain: Chain,
    objective: str,
    frames: Tensor | Pictures,
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
        frames: uint8 ``[B, T, 3, H, W]``, T = 1 for images; or pictures of their own sizes.
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
