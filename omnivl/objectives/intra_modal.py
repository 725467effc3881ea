"""Contrast within a modality: a sample's embedding matches the momentum embedding of the same sample.

The two differ by the view of the picture (``views: 2`` of a data entry), by the text's dropout, and by the weights.

Shapes: B queries of this replica, J joined batch (replicas * B), Q queue entries, P projection size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omnivl.chain.demands import EMBEDDINGS, TWIN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DataKind, is_pair
from omnivl.objectives.contrast import softmax_contrast
from omnivl.objectives.spread_keys import OldKeys, SpreadKeys
from omnivl.objectives.univlc import UniVLCHead, pushed_keys


@dataclass(frozen=True)
class IntraModal(Objective):
    """Pictures against momentum pictures, and texts against momentum texts, over the batch and a queue.

    With query q and momentum keys k of its own modality, the loss is the mean of ``- log softmax(q . k / t)`` at the
    sample's own key, halved over the two modalities. The temperature t is the stage's.

    Attributes:
        queue_size: Keys of earlier steps that are kept; 0 for none.

    Source: Yang et al., TCL, arXiv 2202.10401 (intra-modal contrast, IMC), and its released code: targets are one-hot,
        also where those between modalities are soft.
    Differs: all keys of a sample's identity are positives, and their terms are averaged. Keys of the batch are those of
        all replicas; the released code takes the replica's own. The queue starts empty, that of the code with noise. It
        belongs to this objective; the code has one for both contrasts, with the same keys.
    """

    kind: Literal["intra_modal"] = "intra_modal"
    queue_size: int = 0

    compares_samples: ClassVar[bool] = True

    @property
    def compares_embeddings(self) -> bool:
        """It needs embeddings and identities alone."""
        return True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.queue_size >= 0, "queue_size", "at least 0")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Both embeddings and those of the twins, on all kinds of pairs."""
        if not is_pair(kind):
            return None
        return Demands(reads=frozenset((*EMBEDDINGS, *(TWIN + name for name in EMBEDDINGS), "logit_scale")))

    def build_head(self, sizes: HeadSizes) -> Head | None:
        """The queue, if there is one."""
        return UniVLCHead(self.queue_size, sizes.projection_size) if self.queue_size > 0 else None

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The mean over both modalities; puts the batch's keys into the queue's outbox."""
        identity, scale = state["identity"], state["logit_scale"]
        visual, text = (state[TWIN + name] for name in EMBEDDINGS)
        batch = SpreadKeys.both(visual, text, identity, gather)
        olds: list[OldKeys | None] = [None, None]
        if self.queue_size > 0:
            assert isinstance(heads.own, UniVLCHead)
            if heads.own.training and torch.is_grad_enabled():
                heads.own.outbox.append(pushed_keys(*batch, state.layout.kind))
            queue = heads.own.queue.keys()
            olds = [OldKeys(keys, queue.identity, queue.valid) for keys in (queue.visual, queue.text)]
        losses, metrics = [], dict[str, Tensor]()
        for name, keys, old in zip(EMBEDDINGS, batch, olds, strict=True):
            made = softmax_contrast(state[name], identity, keys, scale, old=old)
            losses.append(made.loss.mean())
            modality = name.removesuffix("_embedding")
            metrics |= {modality: losses[-1].detach(), f"{modality}_r1": made.nearest_is_positive.float().mean()}
        return ObjectiveLoss((losses[0] + losses[1]) / 2.0, metrics)
