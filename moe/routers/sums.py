"""Sums over the tokens of a routed layer in a step.

Sums are added up over replicas before losses are computed from them: the spread of a sum is not the sum of spreads. The
sums of all layers are sent as one vector.

Shapes: T tokens, E experts, M modalities. A modality without a token counts for nothing. Sums of several layers have
the layers as a leading dimension, so that losses and figures of all of them are computed at once.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe.routers.routed import Said


@dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of one layer, fp32. Those marked * carry a gradient.

    Attributes:
        tokens_M: Number of tokens.
        entropy_M: * Entropy of the tokens' probabilities.
        confidence_M: Largest probability.
        choices_M: Choices of the tokens; with expert choice, one for each token.
        dropped_M: Those that no expert served.
        z_M: * Square of the logits' logsumexp.
        probs_ME: * Probabilities.
        load_ME: * Probability of being chosen if the noise were drawn anew; 0 without noise.
        chosen_ME: Choices, whether they were served or dropped.
    """

    tokens_M: Tensor
    entropy_M: Tensor
    confidence_M: Tensor
    choices_M: Tensor
    dropped_M: Tensor
    z_M: Tensor
    probs_ME: Tensor
    load_ME: Tensor
    chosen_ME: Tensor

    @classmethod
    def of(cls, said: Said, modality_T: Tensor, num_modalities: int, valid_T: Tensor | None = None) -> "RouterSums":
        """Sums the outputs of a layer's router over its tokens.

        Args:
            said: Of T tokens.
            modality_T: int64.
            num_modalities: M.
            valid_T: bool; padding does not count. None: all tokens count.
        """
        logits_TE, probs_TE = said.logits_TE, said.probs_TE
        member_MT = modality_T == torch.arange(num_modalities, device=modality_T.device)[:, None]
        member_MT = (member_MT if valid_T is None else member_MT & valid_T).to(probs_TE.dtype)
        lse_T = logits_TE.logsumexp(-1)
        # - sum p log p, written so that the gradient at probability 0 is 0.
        entropy_T = lse_T - (probs_TE * logits_TE.where(logits_TE.isfinite(), 0.0)).sum(-1)
        return cls(
            tokens_M=member_MT.sum(1),
            entropy_M=member_MT @ entropy_T,
            confidence_M=member_MT @ probs_TE.detach().amax(-1),
            choices_M=member_MT @ said.choices_T,
            dropped_M=member_MT @ said.dropped_T,
            z_M=member_MT @ lse_T.square(),
            probs_ME=member_MT @ probs_TE,
            load_ME=member_MT @ (torch.zeros_like(probs_TE) if said.load_TE is None else said.load_TE),
            chosen_ME=member_MT @ (said.served_TE if said.chosen_TE is None else said.chosen_TE),
        )

    def pack(self) -> Tensor:
        """All sums as one vector, ``[6 M + 3 M E]``."""
        return torch.cat([getattr(self, one.name).flatten() for one in fields(self)])

    @classmethod
    def unpack(cls, vector: Tensor, num_modalities: int) -> "RouterSums":
        """The inverse of ``pack``, for vectors ``[..., 6 M + 3 M E]``; E follows from the length."""
        names = [one.name for one in fields(cls)]
        wide = [name for name in names if name.endswith("_ME")]
        narrow = len(names) - len(wide)
        experts = (vector.shape[-1] // num_modalities - narrow) // len(wide)
        sizes = [num_modalities * (experts if name in wide else 1) for name in names]
        parts = dict(zip(names, torch.split(vector, sizes, dim=-1), strict=True))
        table = (*vector.shape[:-1], num_modalities, experts)
        return cls(**{n: p.view(table) if n in wide else p for n, p in parts.items()})
