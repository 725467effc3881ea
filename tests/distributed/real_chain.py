"""A very small real chain with all objectives, and batches for it: those of the whole run, and a replica's share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from moe.config import AttributeConfig, DenseConfig, FeedForwardConfig, LIMoEConfig, MoMEConfig, MoMELIMoEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice
from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout as fold_demands
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import DATA_KINDS, Batch, DataKind, is_video
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, VLM, Objective, UniVLC
from omnivl.parts.sizes import Recompute

PAIRED = DATA_KINDS[:4]  # something to see, with a text

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
CONFIG = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 2, "text_layers": 1, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 8, "video_size": 8, "patch_size": 4},
    **{"num_frames": 4, "tubelet_size": 2, "text_length": 6, "vocab_size": 40},
)
OBJECTIVES: tuple[Objective, ...] = (
    *(MLM(probability=0.5), MRM(targets="momentum"), MFM(), MCM(targets="momentum", every=2)),
    *(UniVLC(queue_size=21, batch_keys="momentum", soft_target_alpha=0.4), VLM(negatives="global"), LM()),
)
# Noise is each replica's own, hence none; every auxiliary loss that can do without it.
ROUTER_LOSSES = NoisyRouterLossConfig(
    **{"importance": 0.1, "load": 0.0, "balance": 0.1, "z": 0.01},
    **{"local_entropy": {"text": 0.1}, "global_entropy": {"image": 0.1, "video": 0.1, "text": 0.1}},
)
STILL = TokenChoice(noise=0.0, losses=ROUTER_LOSSES)
FILLINGS: dict[str, FeedForwardConfig] = {
    "dense": DenseConfig(),
    "mome": MoMEConfig(fusion_from=0),
    "attribute": AttributeConfig(num_experts=4, every=1, noise=0.0),
    "limoe": LIMoEConfig(num_experts=4, every=1, shared_experts=1, router=replace(STILL, top_k=2)),
    "balanced": LIMoEConfig(num_experts=4, every=1, router=replace(STILL, top_k=2, selection_bias_rate=0.02)),
    "mome_limoe": MoMELIMoEConfig(pools={"image": 2, "video": 1, "text": 2}, common_experts=1, every=1, router=STILL),
}
plan_layout = partial(fold_demands, OBJECTIVES)
UNIFIED_OBJECTIVES = tuple(objective for objective in OBJECTIVES if not isinstance(objective, LM))
plan_unified_layout = partial(fold_demands, UNIFIED_OBJECTIVES)


class LetterTokenizer:
    """One token per letter."""

    special = TOKENS

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        rows = [[TOKENS.cls, *(5 + ord(letter) % 35 for letter in text), TOKENS.sep] for text in texts]
        return np.array([row + [TOKENS.pad] * (length - len(row)) for row in rows], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("not needed")

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        everywhere = np.ones(TOKENS.vocab_size, dtype=np.bool_)
        return everywhere, everywhere


def build_real_chain(
    gather: Gather,
    seed: int = 0,
    recompute: Recompute = "none",
    ffn: str = "dense",
    unified: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    settle: Settle | None = None,
) -> Chain:
    torch.manual_seed(seed)
    config = replace(CONFIG, recompute=recompute, ffn=FILLINGS[ffn])
    if unified:
        config = replace(Unified.like(config), multiway=True)
    objectives = UNIFIED_OBJECTIVES if unified else OBJECTIVES
    return build_chain(config, objectives, TOKENS, gather=gather, compute_dtype=compute_dtype, settle=settle)


def step_batches(
    step: int,
    accumulation: int,
    size: int,
    gather: Gather,
    objectives: Sequence[Objective] = OBJECTIVES,
    of: Sequence[DataKind] = PAIRED,
) -> list[Batch]:
    """The replica's micro-batches of one step. Kinds change between and within steps."""
    indices = range(step * accumulation, (step + 1) * accumulation)
    # Pairs of equal kinds first, so that whole steps leave layers out; then mixed ones.
    kinds = [of[(index // 2 if index < 2 * len(of) else index) % len(of)] for index in indices]
    own = size // gather.replicas
    share = slice(gather.replica * own, (gather.replica + 1) * own)
    prepare = Preparation(tuple(objectives), TOKENS, CONFIG.inputs, seed=0)
    collator = Collator(CONFIG.inputs, LetterTokenizer(), prepare)
    return [
        collator.collate(examples(index, size, is_video(kind))[share], kind, "letters", step)
        for index, kind in zip(indices, kinds, strict=True)
    ]


def examples(index: int, size: int, video: bool) -> list[Example]:
    """The samples of micro-batch ``index`` of the whole run."""
    random = np.random.default_rng(index)
    return [
        Example(
            pictures=random.integers(0, 256, (4 if video else 1, 8, 8, 3), dtype=np.uint8),
            text="".join(random.choice(list("abcdefgh"), 1 + row % 4)),
            identity=row % 5,
            label=-1,
            position=index * size + row,
            where="shard:key",
            meta={},
        )
        for row in range(size)
    ]
