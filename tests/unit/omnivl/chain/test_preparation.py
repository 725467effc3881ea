"""Objectives on batches that have only a text, or only pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation, asked_fields, join_draws
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS, DataKind, has_text, has_visual, is_label, is_video, visual_of
from omnivl.data.collate import Collator
from omnivl.data.example import Example
from omnivl.data.fields import Field
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import MFM, MLM, MRM, VQA, Answer, Objective

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
CONFIG = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 8, "video_size": 8, "patch_size": 4},
    **{"num_frames": 2, "text_length": 6, "vocab_size": 40},
)


class LengthTokenizer:
    """A text as its length."""

    special = TOKENS

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        return np.array([[1, 5 + len(text), 6, 2, *[0] * (length - 4)] for text in texts], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("not needed")

    def word_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        everywhere = np.ones(TOKENS.vocab_size, dtype=np.bool_)
        return everywhere, everywhere


@pytest.mark.parametrize(
    ("kind", "objective"), [("text", MLM(grounded=False)), ("image", MRM()), ("video", MFM())], ids=str
)
def test_one_modality_is_trained_alone(kind: DataKind, objective: Objective):
    pictures = np.random.default_rng(0).integers(0, 256, (2 if is_video(kind) else 1, 8, 8, 3), dtype=np.uint8)
    shown, said = pictures if has_visual(kind) else None, "ab" if has_text(kind) else None
    examples = [Example(shown, said, row, -1, row, "s:k", {}) for row in range(3)]
    prepare = Preparation((objective,), TOKENS, CONFIG.inputs, seed=0)
    batch = Collator(CONFIG.inputs, LengthTokenizer(), prepare).collate(examples, kind, "entry", 0)
    assert batch.prepared.keys() >= {f"weight/{objective.key}"}
    torch.manual_seed(0)
    chain = build_chain(CONFIG, (objective,), TOKENS)
    layout = plan_layout((objective,), kind, batch.size, batch.num_frames, batch.entry)
    state = State.from_batch(batch, layout)
    assert ("frames" in state, "token_ids" in state) == (has_visual(kind), has_text(kind))
    loss = chain(state)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    learnt = {
        name.split(".")[0] for name, each in chain.named_parameters() if each.grad is not None and each.grad.any()
    }
    assert learnt == {"embed", "losses", *(["text_00"] if kind == "text" else ["visual_00", "visual_norm"])}


def test_predicates_of_kinds():
    table = {kind: (visual_of(kind), has_text(kind), is_label(kind)) for kind in DATA_KINDS}
    assert table == {
        "image_text": ("image", True, False),
        "video_text": ("clip", True, False),
        "image_label": ("image", True, True),
        "video_label": ("clip", True, True),
        "text": ("none", True, False),
        "image": ("image", False, False),
        "video": ("clip", False, False),
        "images_text": ("set", True, False),
    }
    assert DATA_KINDS[:4] == ("image_text", "video_text", "image_label", "video_label"), "queues store these places"


@dataclass(frozen=True)
class Grounded(MRM):
    """Asks for a box."""

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        return {"region": Field("boxes")}


def test_what_two_objectives_ask_of_one_field_holds_for_both():
    objectives = (Answer(name="first", length=4), VQA(answers=("a",)))
    asked = asked_fields(objectives, "image_text", "entry")
    assert asked == {
        "answers": Field("text", most=10, length=4),
        "weights": Field("number", most=10, required=False, as_many_as="answers"),
    }
    assert asked_fields(objectives[::-1], "image_text", "entry") == asked


def test_fields_are_asked_for_where_an_objective_acts():
    objectives = (MLM(), Grounded(on=("boxes",)))
    assert asked_fields(objectives, "image_text", "boxes") == {"region": Field("boxes")}
    assert asked_fields(objectives, "image_text", "other") == {}
    assert asked_fields(objectives, "video_text", "boxes") == {}


class Twice(MRM):
    """Draws what another objective draws, under the same name."""

    @property
    def key(self) -> str:
        return "again"

    def prepare(self, batch, context):
        return {name.replace("again/", "mrm/"): drawn for name, drawn in super().prepare(batch, context).items()}


def test_two_draws_of_one_name_are_refused():
    one, other = torch.zeros(1), torch.ones(1)
    assert join_draws({"a/rows": one}, {"a/mask": other}) == {"a/rows": one, "a/mask": other}
    pictures = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    prepare = Preparation((MRM(), Twice()), TOKENS, CONFIG.inputs, seed=0)
    with pytest.raises(ValueError, match=r"mrm/.* is drawn twice: each draw of an objective needs a name of its own"):
        Collator(CONFIG.inputs, LengthTokenizer(), prepare).collate(
            [Example(pictures, None, 0, -1, 0, "s:k", {})], "image", "entry", 0
        )
