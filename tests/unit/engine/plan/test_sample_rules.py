"""What objectives ask of samples, against what a data entry keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from engine.plan.parse import parse_plan
from engine.plan.plan import StagePlan
from engine.plan.sample_rules import crops_keep_boxes, objectives_have_their_fields, second_views_are_seen
from omnivl.data.config import AugmentConfig, DataEntryConfig
from omnivl.data.fields import Field
from omnivl.objectives import MRM


@dataclass(frozen=True)
class Ground(MRM):
    """Asks for a box, a mask, and answers if there are any."""

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        return {"region": Field("boxes"), "inside": Field("mask"), "answers": Field("text", most=3, required=False)}


PLAN = """
name: p
model: {preset: tiny}
stages:
  - {name: s, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [mrm]}
"""


def problems(entry: DataEntryConfig) -> list[str]:
    stage: StagePlan = parse_plan(PLAN).stages[0]
    asking = replace(stage, objectives=(Ground(),), data=(entry,))
    found = objectives_have_their_fields(asking)
    return [f"{'.'.join(map(str, problem.path))}: got {problem.got}; allowed {problem.allowed}" for problem in found]


@pytest.mark.parametrize(
    "fields", [{"region": "bbox", "inside": "mask.png"}, {"region": "b", "inside": "m.PNG", "x": "y"}]
)
def test_what_is_asked_for_is_kept(fields):
    assert problems(DataEntryConfig("s", "image_text", fields=fields)) == []


def test_an_objective_asks_nothing_of_kinds_that_it_does_not_act_on():
    assert problems(DataEntryConfig("s", "video_text")) == []


def test_messages():
    assert problems(DataEntryConfig("s", "image_text", fields=("answers",))) == [
        "data.0.fields: got 'answers'; allowed a mapping with 'region', which an objective asks for (boxes)",
        "data.0.fields: got 'answers'; allowed a mapping with 'inside', which an objective asks for (mask)",
    ]
    assert problems(DataEntryConfig("s", "image_text", fields={"region": "box.png", "inside": "mask"})) == [
        "data.0.fields.region: got 'box.png', which is a file; allowed a field of the samples' JSON",
        "data.0.fields.inside: got 'mask', which is no file; allowed a file, e.g. mask.png",
    ]


@pytest.mark.parametrize(
    ("kept", "entry", "message"),
    [
        ("region", {"kind": "image_text", "fields": {"region": "b", "inside": "m.png"}}, None),
        (
            "box",
            {"kind": "image_text", "fields": {"region": "b", "inside": "m.png"}},
            "'box'; allowed a kept field that an ",
        ),
        (
            "inside",
            {"kind": "image_text", "fields": {"region": "b", "inside": "m.png"}},
            "objective reads as boxes: 'region'",
        ),
        ("region", {"kind": "image_text", "fields": ("answers",)}, "objective reads as boxes: there is none"),
        (
            "region",
            {"kind": "images_text", "pictures": ("a", "b"), "fields": {"region": "b"}},
            "'region'; allowed null where a sample has several pictures",
        ),
    ],
)
def test_a_crop_keeps_what_an_objective_reads_as_boxes(kept, entry, message):
    stage = parse_plan(PLAN).stages[0]
    own = DataEntryConfig("s", augment=AugmentConfig(keep=kept), **entry)
    found = list(crops_keep_boxes(replace(stage, objectives=(Ground(),), data=(own,))))
    assert len(found) == (message is not None)
    for problem in found:
        assert problem.path == ("data", 0, "augment", "keep")
        assert message in f"{problem.got}; allowed {problem.allowed}"


def test_a_place_needs_a_picture_to_be_in():
    @dataclass(frozen=True)
    class Second(MRM):
        @property
        def sample_fields(self) -> Mapping[str, Field]:
            return {"region": Field("boxes", picture=1)}

    stage = parse_plan(PLAN).stages[0]
    entry = DataEntryConfig("s", "image_text", fields=("region",))
    (problem,) = objectives_have_their_fields(replace(stage, objectives=(Second(),), data=(entry,)))
    assert problem.got == "'region' in picture 1 of 1"


@pytest.mark.parametrize(
    ("model", "objectives", "kind", "wanted"),
    [
        ("{preset: tiny}", "[{kind: univlc, batch_keys: momentum}]", "image_text", None),
        ("{preset: tiny}", "[{kind: univlc, batch_keys: momentum}]", "video_text", None),
        (
            "{preset: tiny}",
            "[univlc]",
            "image_text",
            "2; allowed 1 where no objective reads what momentum twins see, e.g. univlc with momentum keys",
        ),
        (
            "{preset: tiny}",
            "[{kind: mlm, grounded: false}]",
            "text",
            "2; allowed 1 where no objective reads what momentum twins see, e.g. univlc with momentum keys",
        ),
        (
            "{preset: tiny}",
            "[{kind: mrm, targets: momentum}]",
            "image_text",
            "2; allowed 1 beside objective 'mrm', which compares a picture with its twin's place by place",
        ),
        (
            "{preset: tiny, sizes: native}",
            "[{kind: univlc, batch_keys: momentum}]",
            "image_text",
            "2 with model.sizes 'native'; allowed 1 there",
        ),
    ],
)
def test_a_second_view_is_what_twins_see(model, objectives, kind, wanted):
    source = "emoji" if kind != "text" else "shards.tar"
    plan = PLAN.replace("{preset: tiny}", model).replace("[mrm]", objectives)
    plan = plan.replace("{source: emoji, kind: image_text}", f"{{source: {source}, kind: {kind}}}")
    stage = parse_plan(plan).stages[0]
    entry = replace(stage.data[0], views=2)
    found = list(second_views_are_seen(replace(stage, data=(entry,))))
    assert [f"{problem.got}; allowed {problem.allowed}" for problem in found] == ([] if wanted is None else [wanted])
    assert list(second_views_are_seen(stage)) == []
    assert all(problem.path == ("data", 0, "views") for problem in found)
