"""The layout of a step from the objectives' demands."""

from dataclasses import dataclass

import pytest

from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Demands
from omnivl.errors import ModelError


@dataclass(frozen=True)
class Asking:
    """Something with demands."""

    name: str
    wants: Demands | None

    def demands(self, kind, batch_size):
        return self.wants


def test_segments_are_stacked_in_order():
    layout = plan_layout(
        [
            Asking("mlm", Demands(masked_text={"mlm": 4}, alignment={"mlm": 4})),
            Asking("mrm", Demands(masked_visual={"mrm": 2})),
            Asking("lm", None),
            Asking("univlc", Demands(embeddings=True, momentum=True)),
            Asking("vlm", Demands(alignment={"vlm_positive": 4, "vlm_negative_text": 4})),
        ],
        "image_text",
        4,
        1,
    )
    assert layout.visual == {"clean": slice(0, 4), "mrm": slice(4, 6)}
    assert layout.text == {"clean": slice(0, 4), "mlm": slice(4, 8)}
    assert layout.alignment == {"mlm": slice(0, 4), "vlm_positive": slice(4, 8), "vlm_negative_text": slice(8, 12)}
    assert layout.momentum
    assert not layout.generation
    assert layout.objectives == ("mlm", "mrm", "univlc", "vlm")
    assert not layout.class_only


def test_embeddings_alone_read_the_first_position_only():
    layout = plan_layout([Asking("univlc", Demands(embeddings=True, momentum=True))], "image_label", 4, 1)
    assert layout.class_only
    assert layout.visual == layout.text == {"clean": slice(0, 4)}
    assert not plan_layout([Asking("all", Demands(visual=True))], "image_label", 4, 1).class_only


def test_a_masked_pass_alone_needs_no_clean_rows():
    layout = plan_layout([Asking("mfm", Demands(masked_visual={"mfm": 3}))], "video_label", 3, 8)
    assert layout.visual == {"mfm": slice(0, 3)}
    assert not layout.text
    assert layout.is_video


def test_decoders_need_clean_visual_rows():
    layout = plan_layout([Asking("lm", Demands(generation=True))], "image_text", 2, 1)
    assert layout.visual == {"clean": slice(0, 2)}
    assert layout.generation


def test_two_objectives_of_one_name_are_refused():
    twice = [Asking("mrm", Demands(masked_visual={"mrm": 2}))] * 2
    with pytest.raises(ModelError) as error:
        plan_layout(twice, "image_text", 2, 1)
    assert str(error.value) == (
        "objectives on image_text: two of them claim the stacked rows 'mrm'; "
        "each objective may stand once in a stage: remove one of them"
    )
