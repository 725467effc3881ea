"""The chains of plans of the unified transformer, narrower than in the plan, and batches for them."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from engine.hosts.micro_batch import PlanLayout
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.chain.state import StepLayout
from omnivl.data.batch import DATA_KINDS, Batch, DataKind, has_text, has_visual, is_video, visual_of
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.tokenizer import Tokenizer, load_tokenizer

PLANS = Path(__file__).parents[2] / "configs" / "plans"
NARROW = [
    *("model.hidden_size=24", "model.num_heads=2", "model.projection_size=8", "parallel.precision=fp32"),
    *("model.image_size=32", "model.video_size=32", "model.patch_size=8", "model.num_frames=2", "model.text_length=8"),
]
# Noise is each replica's own, hence none.
STILL = {"limoe_tiny": ["model.ffn.router.noise=0", "model.ffn.router.losses.load=0"]}
WORDS = ("red", "heart", "cat", "face", "sun", "tree", "blue", "dog")


class PlanStage:
    """A stage of a plan of ``configs/plans``, for every kind of data on which one of its objectives acts, sets aside."""

    def __init__(self, plan: str, stage: str) -> None:
        read = load_plan(PLANS / f"{plan}.yaml", [*NARROW, *STILL.get(plan, ())], 1)
        self.stage: StagePlan = read.stage(stage)
        self.tokenizer: Tokenizer = load_tokenizer(read.tokenizer)
        self.plan_layout: PlanLayout = partial(plan_layout, self.stage.objectives)
        self.kinds: Sequence[DataKind] = [
            kind
            for kind in DATA_KINDS
            if visual_of(kind) != "set" and any(one.demands(kind, 2) is not None for one in self.stage.objectives)
        ]

    def build(self, gather: Gather, layouts: Sequence[StepLayout]) -> Chain:
        chain = build_chain(self.stage.model, self.stage.objectives, self.tokenizer.special, gather=gather)
        freeze(chain, self.stage.freeze, "freeze")
        freeze_idle(chain, layouts)
        return chain

    def step_batches(self, step: int, accumulation: int, size: int, gather: Gather) -> list[Batch]:
        """The replica's micro-batches of one step. Kinds change from one micro-batch to the next."""
        indices = range(step * accumulation, (step + 1) * accumulation)
        own = size // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        sizes = self.stage.model.inputs
        collator = Collator(sizes, self.tokenizer, Preparation(self.stage.objectives, self.tokenizer.special, sizes, 0))
        batches = []
        for index in indices:
            kind = self.kinds[index % len(self.kinds)]
            batches.append(collator.collate(_examples(index, size, kind)[share], kind, "words", step))
        return batches


@cache
def plan_stage(plan: str, stage: str) -> PlanStage:
    return PlanStage(plan, stage)


def _examples(index: int, size: int, kind: DataKind) -> list[Example]:
    """The samples of micro-batch ``index`` of the whole run."""
    random, frames = np.random.default_rng(index), 2 if is_video(kind) else 1
    return [
        Example(
            pictures=random.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8) if has_visual(kind) else None,
            text=" ".join(random.choice(WORDS, 2 + row % 4)) if has_text(kind) else None,
            identity=row % 5,
            label=-1,
            position=index * size + row,
            where="shard:key",
            meta={},
        )
        for row in range(size)
    ]
