"""Image-text matching with other samples' images, and the alignment of words and patches.

Shapes: B samples of this replica, K samples that images are drawn from (B, or all replicas' samples), L text positions,
N patches, D hidden size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import Demands, Join
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.objective import Drawn, Heads, Objective, ObjectiveLoss, PrepareContext
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_label, is_pair
from omnivl.objectives.optimal_transport import transport_distance
from omnivl.objectives.vlm import MatchHead, draw_negatives


@dataclass(frozen=True)
class ITM(Objective):
    """Does the text belong to the image? Some samples get another sample's image, drawn uniformly.

    The word-patch alignment makes the optimal transport distance between words and patches small in true pairs and
    large in others. It needs an architecture with the stream ``fused_visual``.

    Attributes:
        replaced: Probability that a sample gets another image.
        negatives: Whether images come from this replica's samples (``local``) or from those of all replicas
            (``global``: joins visual features; the result does not depend on the number of replicas).
        exclude_equal: Whether images of equal identity are left out of the draw; a sample for which no image is left
            keeps its own. If false, a sample may get its own image and count as replaced, as in ViLT.
        alignment_weight: Factor of the word-patch alignment in the loss; 0 leaves it out.
        include_labels: Whether class prompts are matched too.

    Source: Kim et al., ViLT, arXiv 2102.03334, section 3.3.
    Differs: each sample's image is replaced with a probability, keyed by its position in the data; ViLT replaces half
        of each batch. Other images come from the batch; ViLT's come from the whole data set.
    """

    kind: Literal["itm"] = "itm"
    replaced: float = 0.5
    negatives: Literal["local", "global"] = "local"
    exclude_equal: bool = True
    alignment_weight: float = 0.1
    include_labels: bool = False

    compares_samples: ClassVar[bool] = True
    scores_pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 < self.replaced < 1.0, "replaced", "above 0 and below 1")
        self.require(self.alignment_weight >= 0.0, "alignment_weight", "at least 0")

    @property
    def needs_whole_texts(self) -> bool:
        """Those of other replicas are joined with these."""
        return self.negatives == "global"

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample."""
        if not is_pair(kind) or (is_label(kind) and not self.include_labels):
            return None
        aligned = {"fused_visual"} if self.alignment_weight > 0.0 else set()
        return Demands(joins={self.key: Join(drawn="sees")}, reads=frozenset({"pooled", *aligned}))

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``{key}/uniforms`` fp32 ``[B, 2]``: whether the image is replaced, and by which."""
        draws = context.uniforms(self.key, batch, 2).astype(np.float32)
        # Rounding to fp32 may give 1, which is outside [0, 1).
        return {f"{self.key}/uniforms": torch.from_numpy(np.minimum(draws, np.float32(1 - 2**-24)))}

    def draw(self, state: State, gather: Gather) -> Drawn:
        """Draws images uniformly; adds ``{key}/matches`` bool ``[B]``."""
        identity, uniforms = state["identity"], state[f"{self.key}/uniforms"]
        # Drawn in replica order, then converted to indices with own rows first: the draw equals that of the joined
        # batch.
        world = gather if self.negatives == "global" else LocalGather()
        candidates = world.join(identity)
        admissible = torch.ones(len(identity), len(candidates), dtype=torch.bool, device=identity.device)
        if self.exclude_equal:
            admissible = identity[:, None] != candidates
        other = draw_negatives(torch.zeros(admissible.shape, device=identity.device), admissible, uniforms[:, 1], 0.0)
        other = (other - world.replica * len(identity)) % len(candidates)
        replaced = (uniforms[:, 0] < self.replaced) & admissible.any(-1)
        own = torch.arange(len(identity), device=identity.device)
        rows = {self.key: torch.where(replaced, other, own)}
        return Drawn(rows, self.negatives == "global", {f"{self.key}/matches": ~replaced})

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Two scores, no match and match, from a pooled fused row."""
        return MatchHead(sizes.pooled)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean two-way cross-entropy, and the alignment."""
        assert isinstance(heads.own, MatchHead)
        matches = state[f"{self.key}/matches"]
        logits = heads.own(state.pooled(self.key))
        loss = F.cross_entropy(logits, matches.long())
        with torch.no_grad():
            metrics = {"accuracy": (logits.argmax(-1) == matches).float().mean(), "matches": matches.float().mean()}
        if self.alignment_weight > 0.0:
            distance = self._distances(state)
            metrics |= {"distance": distance.detach().mean()}
            loss = loss + self.alignment_weight * torch.where(matches, distance, -distance).mean()
        return ObjectiveLoss(loss, metrics)

    def _distances(self, state: State) -> Tensor:
        """Transport distances of each row's words and patches, fp32 ``[B]``; without [CLS], [SEP] and class token."""
        rows = state.layout.fused[self.key]
        words, patches = state.rows("fused", self.key)[:, 1:], state.rows("fused_visual", self.key)[:, 1:]
        has_token = state["fused_mask"][rows]
        # Tokens come before padding and the last is [SEP]: a token is a word if the next position has a token as well.
        is_word = has_token[:, 1:].clone()
        is_word[:, :-1] &= has_token[:, 2:]
        is_word[:, -1] = False
        is_patch = torch.ones_like(patches[..., 0], dtype=torch.bool)
        if "memory_mask" in state:
            is_patch = state["memory_mask"][state["fused_memory"][rows]][:, 1:]
        return transport_distance(words, patches, is_word, is_patch)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Log odds of "match" for each fused row, fp32 ``[R]``."""
        assert isinstance(heads.own, MatchHead)
        logits = heads.own(state.pooled(self.key))
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds
