"""The chains of plans, narrower than in the plan, and batches for them."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.hosts.micro_batch import PlanLayout
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.chain.state import StepLayout
from omnivl.data.batch import Batch, DataKind, has_text, has_visual, is_video
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.fields import Field, FieldReader
from omnivl.data.tokenizer import TextReader, Tokenizer, load_tokenizer

PLANS = Path(__file__).parents[2] / "configs" / "plans"
NARROW = [
    *("model.hidden_size=24", "model.num_heads=2", "model.projection_size=8", "parallel.precision=fp32"),
    *("model.image_size=32", "model.video_size=32", "model.patch_size=8", "model.num_frames=2", "model.text_length=8"),
    "batch.micro_batch_size_per_gpu=8",
]
_NARROW_TEXTS = "{hidden_size: 16, num_heads: 2, layers: 2, norm_eps: 1e-5}"
NARROW_STACKS = {
    "coca_tiny": [
        "model.vision={hidden_size: 24, num_heads: 2, layers: 2, norm_eps: 1e-5}",
        *(f"model.{name}={_NARROW_TEXTS}" for name in ("text", "multimodal")),
        *("model.caption_queries=3", "model.projection_size=8", "model.image_size=32", "model.patch_size=8"),
        *("model.num_frames=2", "model.text_length=8", "parallel.precision=fp32", "batch.micro_batch_size_per_gpu=8"),
    ],
    "git_tiny": [
        "model.vision={hidden_size: 24, num_heads: 2, layers: 2, norm_eps: 1e-5}",
        "model.decoder={hidden_size: 16, num_heads: 2, layers: 2, norm: post, norm_eps: 1e-12}",
        *("model.image_size=32", "model.patch_size=8", "model.num_frames=2", "model.text_length=8"),
        *("parallel.precision=fp32", "batch.micro_batch_size_per_gpu=8"),
    ],
    "simvlm_tiny": [
        *(f"model.{name}={{hidden_size: 16, num_heads: 2, layers: 2}}" for name in ("encoder", "decoder")),
        *("model.stem_width=4", "model.image_size=32", "model.text_length=8"),
        *("parallel.precision=fp32", "batch.micro_batch_size_per_gpu=8"),
    ],
    "pali_tiny": [
        "model.vision={hidden_size: 24, num_heads: 2, layers: 2}",
        *(f"model.{name}={{hidden_size: 16, num_heads: 2, layers: 2}}" for name in ("encoder", "decoder")),
        *("model.head_size=6", "model.image_size=32", "model.patch_size=8", "model.text_length=8"),
        *("parallel.precision=fp32", "batch.micro_batch_size_per_gpu=8"),
    ],
}
"""In place of ``NARROW`` where each stack has its own width."""
# Noise is each replica's own, hence none.
STILL = ["model.ffn.router.noise=0", "model.ffn.router.losses.load=0"]
CHANGED = {
    "limoe_tiny": STILL,
    "pali_tiny": ["stages.0.evaluate.tasks=[]"],  # no questions, whose answers a task scores
    # A bag of words, as suits names; the last of three blocks has experts.
    "quickstart": [
        *(*STILL, "model.vision_layers=3", "model.text_layers=0", "model.alignment_layers=1"),
        *("model.generation_layers=1", "model.text_pooling=mean", "model.visual_pooling=mean", "model.tubelet_size=1"),
    ],
}
PAIRS = "{source: emoji, kind: image_text, name: pairs}"
LABELS = "{source: emoji, kind: image_label, name: labels, prompts: ['a {label}']}"
CLIPS = "{source: emoji, kind: video_text, name: clips}"
PICTURES = "{source: emoji, kind: image, name: pictures}"
TEXTS = "{source: emoji, kind: text, name: texts}"
# Negatives of a replica's own samples would differ from those of the joined batch.
OF_PAIRS = [
    "{kind: univlc, queue_size: 0, batch_keys: online}",
    "{kind: vlm, negatives: global}",
    "{kind: mlm, weight: 0.25}",
]
# Pictures, texts and clips in turn, each with objectives of its own.
IN_TURN = [
    "{kind: mrm, on: [pictures]}",
    "{kind: mlm, grounded: false, on: [texts]}",
    "{kind: univlc, queue_size: 0, batch_keys: online, on: [clips]}",
    "{kind: vlm, negatives: global, on: [clips]}",
    "{kind: mlm, name: words, on: [clips]}",
]
# Three of eight words are not in the list: micro-batches and replicas have different numbers of samples to count.
NAMED = [
    "{kind: classify, names: [red, heart, cat, face, sun], prompt: 'a {name}', label_smoothing: 0.1}",
    "{kind: univlc, queue_size: 21, batch_keys: momentum, soft_target_alpha: 0.4}",
]
UNIFIED: dict[str, tuple[str, list[str], list[str]]] = {
    "beit3_tiny-masked": ("masked", [PAIRS, LABELS], []),
    "vlmo_tiny-language": ("language", [PAIRS, CLIPS, TEXTS], []),
    "vlmo_tiny-pairs": ("pairs", [PAIRS, CLIPS, LABELS], OF_PAIRS),
    "vlmo_tiny-turns": ("pairs", [PICTURES, TEXTS, CLIPS], IN_TURN),
    "limoe_tiny-contrastive": ("contrastive", [PAIRS, CLIPS, LABELS], []),
}
"""Of one transformer, by name: the stage of the plan, its data and, where they are not the plan's, its objectives."""
# Every objective on pictures, clips and texts, of pictures and clips of their own sizes.
OF_OWN_SIZES = [*OF_PAIRS, "{kind: mrm, every: 2}", "{kind: mfm, every: 2}"]
STAGES = {
    **UNIFIED,
    "coca_tiny-pairs": ("pairs", [PAIRS, CLIPS, LABELS], []),
    "git_tiny-captions": ("captions", [PAIRS, CLIPS], []),
    "simvlm_tiny-pairs": ("pairs", [PAIRS], []),
    "pali_tiny-mixture": ("mixture", [PAIRS], ["{kind: split_lm, name: captions, prompt: 'red', most: 0}", "split_lm"]),
    "quickstart-own": ("spatial", [PAIRS, CLIPS, LABELS], [*OF_OWN_SIZES, "{kind: lm}"]),
    "vlmo_tiny-own": ("pairs", [PAIRS, CLIPS], OF_OWN_SIZES),
    "quickstart-names": ("spatial", [entry[:-1] + ", fields: [name]}" for entry in (PAIRS, CLIPS, LABELS)], NAMED),
}
WORDS = ("red", "heart", "cat", "face", "sun", "tree", "blue", "dog")


class PlanStage:
    """A stage of a plan of ``configs/plans``, with several data entries that come in turn."""

    def __init__(self, name: str) -> None:
        stage, data, objectives = STAGES[name]
        plan = name.partition("-")[0]
        changed = [*NARROW_STACKS.get(plan, NARROW), *CHANGED.get(plan, ()), f"stages.{stage}.data=[{', '.join(data)}]"]
        self._own_sizes = name.endswith("-own")
        if self._own_sizes:
            changed.append("model.sizes=native")
        if objectives:
            changed.append(f"stages.{stage}.objectives=[{', '.join(objectives)}]")
        read = load_plan(PLANS / f"{plan}.yaml", changed, 1)
        self.stage: StagePlan = read.stage(stage)
        self.tokenizer: Tokenizer = load_tokenizer(read.tokenizer)
        self.plan_layout: PlanLayout = partial(plan_layout, self.stage.objectives)
        sizes = self.stage.model.inputs
        readers = {"text": TextReader(self.tokenizer, sizes.text_length)}
        prepare = Preparation(self.stage.objectives, self.tokenizer.special, sizes, 0, readers)
        self._collator = Collator(sizes, self.tokenizer, prepare)

    @property
    def layouts(self) -> list[StepLayout]:
        return self.stage.layouts()

    def build(self, gather: Gather, settle: Settle | None, seed: int) -> Chain:
        torch.manual_seed(seed)
        stage, tokens = self.stage, self.tokenizer.special
        chain = build_chain(stage.model, stage.objectives, tokens, gather=gather, settle=settle)
        freeze(chain, self.stage.freeze, "freeze")
        freeze_idle(chain, self.layouts)
        return chain

    def step_batches(self, step: int, accumulation: int, size: int, gather: Gather) -> list[Batch]:
        """The replica's micro-batches of one step, of the entries in turn."""
        own = size // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        batches = []
        for index in range(step * accumulation, (step + 1) * accumulation):
            entry = self.stage.data[index % len(self.stage.data)]
            key = entry.name or ""
            types = FieldReader(entry, asked_fields(self.stage.objectives, entry.kind, key)).types
            examples = _examples(index, size, entry.kind, types, self._own_sizes)[share]
            batches.append(self._collator.collate(examples, entry.kind, key, step, types))
        return batches


@cache
def plan_stage(name: str) -> PlanStage:
    return PlanStage(name)


def _examples(index: int, size: int, kind: DataKind, types: Mapping[str, Field], own_sizes: bool) -> Sequence[Example]:
    """The samples of micro-batch ``index`` of the whole run; each of their fields holds a word."""
    random, frames = np.random.default_rng(index), 2 if is_video(kind) else 1

    def pixels() -> NDArray[np.uint8]:
        sides = 8 * random.integers(1, 5, 2) if own_sizes else (32, 32)
        return random.integers(0, 256, (frames, *sides, 3), dtype=np.uint8)

    return [
        Example(
            pictures=pixels() if has_visual(kind) else None,
            text=" ".join(random.choice(WORDS, 2 + row % 4)) if has_text(kind) else None,
            identity=row % 5,
            label=-1,
            position=index * size + row,
            where="shard:key",
            meta={},
            fields={name: str(random.choice(WORDS)) for name in types},
        )
        for row in range(size)
    ]
