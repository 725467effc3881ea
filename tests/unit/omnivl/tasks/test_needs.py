"""What tasks need, and how a stage that lacks it is described."""

from dataclasses import replace

import pytest

from engine.plan.evaluation import possible_kinds, provided_in
from engine.plan.parse import parse_plan
from engine.plan.schema import kinds
from moe.config import LIMoEConfig
from omnivl.architectures import OmniVL
from omnivl.objectives import ITM, LM, MLM, MMM, VLM, UniVLC
from omnivl.tasks import (
    CaptionTask,
    Head,
    Lack,
    MatchingTask,
    Provided,
    RetrievalTask,
    RoutingTask,
    TaskConfig,
    ZeroShotTask,
)

MODEL = OmniVL.presets["tiny"]
NO_EMBEDDINGS = Lack("has no trained embeddings", "add a contrastive objective such as 'univlc'")
NO_VLM = Lack("does not train 'vlm'", "add the objective 'vlm'", "rerank", 0)
NO_MATCHER = Lack(
    "trains 'lm', which scores no pairs", "name an objective that does, such as 'vlm', 'itm' or 'mmm'", "rerank", 0
)
NO_LM = Lack("does not train 'lm'", "add the objective 'lm'")


@pytest.mark.parametrize(
    ("task", "objectives", "earlier", "lacks"),
    [
        (RetrievalTask(), (UniVLC(),), (), []),
        (RetrievalTask(), (MLM(),), (UniVLC(),), []),
        (RetrievalTask(), (MLM(),), (MLM(),), [NO_EMBEDDINGS]),
        (RetrievalTask(rerank=4), (UniVLC(), VLM()), (), []),
        (RetrievalTask(rerank=4), (UniVLC(),), (VLM(),), [NO_VLM]),
        (RetrievalTask(rerank=4), (LM(),), (), [NO_EMBEDDINGS, NO_VLM]),
        (ZeroShotTask(), (LM(),), (), [NO_EMBEDDINGS]),
        (RetrievalTask(rerank=4, matcher="lm"), (UniVLC(), LM()), (), [NO_MATCHER]),
        (MatchingTask(objective="pairs"), (ITM(name="pairs"),), (), []),
        (MatchingTask(objective="mmm"), (MMM(),), (), []),
        (MatchingTask(objective="lm"), (LM(),), (), [replace(NO_MATCHER, option=None, without=None)]),
        (CaptionTask(), (LM(),), (), []),
        (CaptionTask(), (LM(name="writer"),), (), [NO_LM]),
        (CaptionTask(), (UniVLC(),), (LM(),), [NO_LM]),
        (
            RoutingTask(),
            (UniVLC(),),
            (),
            [
                Lack(
                    "has no routers in its 'dense' feed-forward layers", "use model.ffn of kind 'limoe' or 'mome_limoe'"
                )
            ],
        ),
    ],
)
def test_needs(task, objectives, earlier, lacks):
    assert task.lacks(Provided(MODEL, objectives, earlier)) == lacks


def test_a_head_has_to_predict():
    found = Head("univlc", "objective", "vlm").lack(Provided(MODEL, (UniVLC(),)))
    assert found == Lack("trains 'univlc', which predicts nothing", "name another objective", "objective", "vlm")
    assert Head("pairs").lack(Provided(MODEL, (UniVLC(), VLM(name="pairs")))) is None, "a key, not a kind"


def test_every_kind_alone_stands_for_a_task_of_that_name():
    for kind, cls in kinds(TaskConfig).items():
        assert (cls().kind, cls().name) == (kind, kind)


def test_possible_kinds_ask_every_member_of_the_union():
    assert possible_kinds(Provided(MODEL, (MLM(),))) == []
    assert possible_kinds(Provided(MODEL, (UniVLC(),))) == ["retrieval", "zero_shot", "neighbors"]
    sparse = replace(MODEL, ffn=LIMoEConfig(num_experts=4))
    wanted = ["retrieval", "zero_shot", "neighbors", "caption", "routing"]
    assert possible_kinds(Provided(sparse, (UniVLC(), LM()))) == wanted


def test_a_stage_has_what_stages_that_it_descends_from_have_trained():
    stages = "".join(
        f"  - {{name: {name}, {parent} objectives: [{objective}], steps: 2, "
        "data: [{source: emoji, kind: image_text}], optimizer: {warmup_steps: 1}}\n"
        for name, parent, objective in (
            ("first", "", "univlc"),
            ("aside", "", "mlm"),
            ("second", "init_from: first,", "mlm"),
            ("third", "init_from: second,", "lm"),
        )
    )
    plan = parse_plan(f"name: p\nmodel: {{preset: tiny}}\nstages:\n{stages}")
    found = {stage.name: possible_kinds(provided_in(plan, stage)) for stage in plan.stages}
    embedded = ["retrieval", "zero_shot", "neighbors"]
    assert found == {"first": embedded, "aside": [], "second": embedded, "third": [*embedded, "caption"]}
    assert [stage.name for stage in plan.ancestors(plan.stages[3])] == ["second", "first"]
