"""Ranking of a list of answers to questions about images, by their probability under a decoder.

Shapes: B samples, T frames, H x W pixels, L text positions, A answers, M token positions of an answer, K answers that
    are scored as a whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.chain import Chain
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.inference.generate import ChainDecoder
from omnivl.inference.written import looked_at, written_layout
from omnivl.objectives.lm import shift


@torch.no_grad()
def rank_answers(
    chain: Chain,
    objective: str,
    frames: Tensor | Pictures,
    token_ids: Tensor,
    answers: Tensor,
    tokens: SpecialTokens,
    *,
    candidates: int = 128,
    first_token_twice: bool = False,
) -> Tensor:
    """Log probabilities of answers.

    Only the answers with the likeliest first tokens are scored as a whole.

    Args:
        chain: A chain with the objective's head.
        objective: Key of an objective that writes answers to questions, such as ``answer``.
        frames: uint8 ``[B, T, 3, H, W]``, T = 1 for images; or pictures of their own sizes.
        token_ids: int64 ``[B, L]``, a question for each image.
        answers: int64 ``[A, M]``: [CLS] t1 .. tn [SEP], padded.
        tokens: Special tokens of the tokenizer.
        candidates: K; if larger than A, all answers.
        first_token_twice: Whether the first token's log probability is counted a second time, as in ALBEF's code.

    Returns:
        fp32 ``[B, A]``; minus infinity for answers that are not among the K.

    Raises:
        UserError: The chain has no such objective, or it writes nothing.

    Source: Li et al., ALBEF, arXiv 2107.07651, section 4, and its code (K is 128).
    """
    memory, mask = looked_at(chain, objective, frames, token_ids)
    start = torch.full((len(frames), 1), tokens.decode, device=frames.device)
    logits = ChainDecoder(chain, objective, memory, 1, cached=False, memory_mask=mask)(start, None)
    first = F.log_softmax(logits.float(), dim=1).index_select(1, answers[:, 1])
    likeliest, chosen = first.topk(min(candidates, len(answers)), dim=1)
    inputs, targets = shift(answers[chosen.flatten()], tokens)
    given = {
        "memory": memory,
        **({} if mask is None else {"memory_mask": mask}),
        "generation_memory": torch.arange(len(frames), device=frames.device).repeat_interleave(chosen.shape[1]),
        f"{objective}/token_ids": inputs,
        f"{objective}/targets": targets,
    }
    state = chain.fold(State(given, written_layout(chain, objective, len(inputs))))
    whole = state[f"{objective}/prediction"].view_as(likeliest)
    if first_token_twice:
        whole = whole + likeliest
    return torch.full_like(first, float("-inf")).scatter(1, chosen, whole)
