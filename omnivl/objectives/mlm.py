"""Masked language modelling, grounded in the sample's image, clip or set of images, or by the text alone.

Shapes: B samples, L text positions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omnivl.chain.demands import REGIONS, TWIN, VOCABULARY, Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, ObjectiveLoss, PrepareContext, ramp
from omnivl.chain.positions import IGNORED, chosen_of, ids_name, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import Tokenizer
from omnivl.objectives.regions import RegionObjective
from omnivl.objectives.text_lists import read_list
from omnivl.objectives.vocabulary import Teacher, num_targets, token_loss

Ids = NDArray[np.int64]
Uniforms = NDArray[np.float64]


@dataclass(frozen=True)
class MLM(RegionObjective):
    """Hides tokens; the masked text goes through the text encoder and, joined with visuals, through the fused blocks.

    Attributes:
        grounded: Whether the words are restored from the image, clip or set of images as well; if false, from the text
            alone, as in BERT.
        probability: Share of ordinary tokens to predict. At least one per text that has any.
        mask_share: Share of these replaced by [MASK].
        random_share: Share of these replaced by a random ordinary token; the rest stays as it is.
        whole_words: Whether all tokens of a word are predicted together: ``probability`` is then that of a word.
        words: The only words whose tokens are hidden, where others would be read off the text alone; a list, or the
            path of a text file with one on each line. The plan that a run keeps holds the list. Empty: all words.
        include_labels: Whether class prompts are masked too.
        soft_target_alpha: Share of the target that is the momentum model's softmax for the same masked text and sample;
            0 for none. Needs the model's momentum twins, and an architecture with the stream ``momentum_fused``.
        soft_target_warmup_steps: The share rises linearly over this many steps.

    Source: Devlin et al., BERT, arXiv 1810.04805, section 3.1, and its code for whole words; soft targets: Li et al.,
        ALBEF, arXiv 2107.07651, section 3.3.
    Differs: in a text for which no token was drawn, one is hidden all the same.
    """

    kind: Literal["mlm"] = "mlm"
    grounded: bool = True
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False
    words: str | tuple[str, ...] = ()
    include_labels: bool = False
    soft_target_alpha: float = 0.0
    soft_target_warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range, or the list of words cannot be read.
        """
        super().__post_init__()
        self.require(0.0 < self.probability <= 1.0, "probability", "above 0 and at most 1")
        self.require(0.0 <= self.mask_share <= 1.0, "mask_share", "from 0 to 1")
        most = 1.0 - self.mask_share
        self.require(0.0 <= self.random_share <= most + 1e-9, "random_share", f"from 0 to 1 - mask_share = {most:g}")
        self.require(0.0 <= self.soft_target_alpha < 1.0, "soft_target_alpha", "at least 0 and below 1")
        self.require(self.soft_target_alpha == 0.0 or not self.regions, "soft_target_alpha", "0 with regions")
        self.require(self.grounded or not self.regions, "grounded", "true with regions")
        teaches = self.soft_target_alpha == 0.0 or self.grounded
        self.require(teaches, "soft_target_alpha", "0 unless grounded is true: the teacher reads fused rows")
        self.require(self.soft_target_warmup_steps >= 0, "soft_target_warmup_steps", "at least 0")
        object.__setattr__(self, "words", read_list(self.words, f"objective {self.key}", "words"))

    @property
    def restored_words(self) -> dict[str, float]:
        """The share of hidden tokens."""
        return {self.key: self.probability}

    def after_training(self) -> Self:
        """The same without a teacher: its head still predicts masked words."""
        return replace(self.apart(), soft_target_alpha=0.0)

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One masked text row and, if grounded, one fused row per sample."""
        lacks = not has_text(kind) or (self.grounded and visual_of(kind) == "none")
        if lacks or (is_label(kind) and not self.include_labels) or not self.takes(kind):
            return None
        joins = {self.key: Join(text=self.key, sees=self.pairs)} if self.grounded else {}
        twins = (TWIN + "fused", TWIN + VOCABULARY) if self.soft_target_alpha > 0.0 else ()
        rows, reads = {"text": {self.key: self.num_pairs(batch_size)}}, frozenset({VOCABULARY, *twins})
        return Demands(rows=rows, joins=joins, reads=reads, regions=self.regions)

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``{key}/token_ids`` and ``{key}/targets``, int64 ``[B, L]``.

        With soft targets, ``{key}/alpha`` is their share in this step, fp32 scalar.
        """
        corrupted, targets = self.hide_all(self.key, batch, context)
        prepared = {f"{self.key}/token_ids": corrupted, **prepared_targets(self.key, targets)}
        if self.soft_target_alpha > 0.0:
            alpha = self.soft_target_alpha * ramp(context.step, self.soft_target_warmup_steps)
            prepared[f"{self.key}/alpha"] = torch.tensor(alpha, dtype=torch.float32)
        return prepared

    def hide_all(self, purpose: str, batch: Batch, context: PrepareContext) -> tuple[Tensor, Tensor]:
        """The corrupted texts of a batch and their targets, int64 ``[B, L]`` each; ``purpose`` keys the draws.

        With regions the texts are what is said of these, ``[R, L]``.
        """
        assert batch.token_ids is not None, "acts on kinds with a text"
        token_ids = (batch.prepared[ids_name(REGIONS)] if self.regions else batch.token_ids).numpy()
        draws = _draws(token_ids.shape[1]) * len(token_ids) // batch.size
        uniforms = context.uniforms(purpose, batch, draws).reshape(len(token_ids), -1)
        first = first_of_word(token_ids, context.readers["text"].tokenizer) if self.whole_words else None
        corrupted, targets = self.hide(uniforms, token_ids, context.tokens, self._hidden_ids(context), first)
        return torch.from_numpy(corrupted), torch.from_numpy(targets)

    def _hidden_ids(self, context: PrepareContext) -> Ids | None:
        """The ids that ``words`` allows to be hidden; None: all ordinary ones."""
        if not self.words:
            return None
        reader = context.readers["text"]
        return np.unique([token for word in self.words for token in reader.words(word)])

    def hide(
        self,
        uniforms: Uniforms,
        token_ids: Ids,
        tokens: SpecialTokens,
        only: Ids | None = None,
        first: Ids | None = None,
    ) -> tuple[Ids, Ids]:
        """Hides tokens of all texts of a batch at once; the result for a text depends on its own row only.

        Args:
            uniforms: Numbers in [0, 1), ``[B, 1 + 3 L]``: which token is hidden if none was drawn; then for each
                position whether it is hidden, whether it is masked, replaced or kept, and which random token would
                replace it.
            token_ids: int64 ``[B, L]``, not changed.
            tokens: Special ids, which are never hidden and never used as replacement.
            only: The ids that may be hidden; None: all ordinary ones.
            first: int64 ``[B, L]``, where the word of each token begins, which is hidden as a whole; None: each token
                is drawn by itself.

        Returns:
            The corrupted texts and the targets, int64 ``[B, L]`` each.
        """
        candidate = ordinary(token_ids, tokens)
        if only is not None:
            candidate &= np.isin(token_ids, only)
        draws = uniforms[:, 1:].reshape(*token_ids.shape, 3)
        drawn = draws[..., 0] < self.probability
        chosen = candidate & (drawn if first is None else np.take_along_axis(drawn, first, axis=1))
        number = candidate.sum(1)
        lacking = np.flatnonzero((number > 0) & ~chosen.any(1))
        rank = (uniforms[lacking, 0] * number[lacking]).astype(np.int64)  # the rank-th ordinary token of the text
        picked = candidate[lacking] & (candidate[lacking].cumsum(1) == 1 + rank[:, None])
        if first is not None:
            own = np.take_along_axis(first[lacking], picked.argmax(1)[:, None], axis=1)
            picked = candidate[lacking] & (first[lacking] == own)
        chosen[lacking] = picked
        row, place = np.nonzero(chosen)
        original, allowed = token_ids[row, place], ordinary_ids(tokens)
        lot, pick = draws[row, place, 1], (draws[row, place, 2] * allowed.size).astype(np.int64)
        corrupted, targets = token_ids.copy(), np.full(token_ids.shape, IGNORED, dtype=np.int64)
        targets[row, place] = original
        kept_or_replaced = np.where(lot >= 1.0 - self.random_share, allowed[pick], original)
        corrupted[row, place] = np.where(lot < self.mask_share, tokens.mask, kept_or_replaced)
        return corrupted, targets

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The hidden tokens."""
        return {self.key: num_targets(state[f"{self.key}/targets"])}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean cross-entropy over hidden tokens, a share of it with the teacher's softmax."""
        hidden, teacher = state.rows("fused" if self.grounded else "text", self.key), None
        if self.soft_target_alpha > 0.0:
            taught = state.rows(TWIN + "fused", self.key)
            teacher = Teacher(taught, heads.momentum_vocabulary, state[f"{self.key}/alpha"])
        targets, weight = state[f"{self.key}/targets"], state.term_weight(self.key)
        return token_loss(
            *(hidden, targets, heads.vocabulary, gather),
            teacher=teacher,
            term_weight=weight,
            chosen=chosen_of(state, self.key),
        )


def first_of_word(token_ids: Ids, tokenizer: Tokenizer) -> Ids:
    """Where the word of each token begins, int64 ``[B, L]``.

    Args:
        token_ids: int64 ``[B, L]``.
        tokenizer: What made them.
    """
    begins, ends = tokenizer.word_bounds()
    starts = begins[token_ids]
    starts[:, 1:] |= ends[token_ids[:, :-1]]
    starts[:, 0] = True
    places = np.arange(token_ids.shape[1])
    first: Ids = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return first


def _draws(length: int) -> int:
    """Number of uniforms for a text of ``length`` positions; a longer text begins with those of a shorter one."""
    return 1 + 3 * length


def ordinary(token_ids: Ids, tokens: SpecialTokens) -> NDArray[np.bool_]:
    """Where a token is neither special nor reserved."""
    found: NDArray[np.bool_] = _is_ordinary(tokens)[token_ids]
    return found


@lru_cache(maxsize=4)
def ordinary_ids(tokens: SpecialTokens) -> Ids:
    """All ids that may replace a hidden token."""
    return np.flatnonzero(_is_ordinary(tokens))


@lru_cache(maxsize=4)
def _is_ordinary(tokens: SpecialTokens) -> NDArray[np.bool_]:
    """For every id of the vocabulary whether it is neither special nor reserved."""
    table = np.arange(tokens.vocab_size) >= tokens.num_reserved
    table[[tokens.pad, tokens.cls, tokens.sep, tokens.mask, tokens.decode]] = False
    return table
