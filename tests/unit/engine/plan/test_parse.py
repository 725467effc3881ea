"""Typing, overrides and resolution of plans. Every kind of mistake has its exact message."""

from pathlib import Path

import pytest

from engine.errors import PlanError
from engine.plan.parse import load_plan, parse_plan
from engine.plan.schema import kinds
from omnivl.architectures import ArchitectureConfig, OmniVL
from omnivl.objectives import MLM, ObjectiveConfig, UniVLC

# Line by line, so that a test can say which line it expects.
LINES = {
    "name": "name: run",
    "model": "model: {preset: tiny, vocab_size: 100}",
    "parallel": "parallel: {host: plain, precision: fp32}",
    "batch": "batch: {micro_batch_size_per_gpu: 4}",
    "stages": "stages:",
    "first": "  - name: one",
    "steps": "    steps: 3",
    "data": "    data: [{source: emoji, kind: image_text}]",
    "objectives": "    objectives: [univlc]",
    "more": "",
}


def plan_text(**changed: str) -> str:
    """A right plan with some lines changed; ``more`` is line 10."""
    return "\n".join({**LINES, **changed}.values())


def problems(text: str, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(PlanError) as caught:
        parse_plan(text, "p.yaml", overrides, world_size)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


PLAN_KEYS = "name, stages, seed, tokenizer, model, parallel, launch, batch, loader, checkpoint, guard, logging"
STAGE_KEYS = "name, steps, data, objectives, epochs, optimizer, init_from, weights, freeze, lora, model, parallel, batch, evaluate"
OBJECTIVES = ", ".join(map(repr, kinds(ObjectiveConfig)))
ARCHITECTURES = " or ".join(", ".join(map(repr, kinds(ArchitectureConfig))).rsplit(", ", 1))


def test_a_right_plan_is_typed_and_complete() -> None:
    plan = parse_plan(plan_text(more="    optimizer: {lr: 1e-3}"))
    (stage,) = plan.stages
    assert stage.objectives == (UniVLC(),)
    assert stage.optimizer.lr == 1e-3
    assert stage.model == plan.model
    assert plan.model.hidden_size == OmniVL.presets["tiny"].hidden_size
    assert plan.model.vocab_size == 100
    assert stage.parallel.host == "plain"
    assert stage.batch.micro_batch_size_per_gpu == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"name": "nam: run"},
            [
                "p.yaml:1: name: got nothing; allowed text; add 'name'",
                f"p.yaml:1: nam: got an unknown key; allowed {PLAN_KEYS}; did you mean 'name'?",
            ],
        ),
        (
            {"model": "model: {preset: tinny, vocab_size: 100}"},
            [
                "p.yaml:2: model.preset: got 'tinny'; allowed 'tiny', 'small', 'base', 'large', 'giant' or a YAML file; "
                "did you mean 'tiny'?"
            ],
        ),
        (
            {"model": "model: {vocab_size: 100, momentum: 3}"},
            ["p.yaml:2: model.momentum: got 3; allowed a mapping or null; change it to a mapping or null"],
        ),
        (
            {"model": "model: {vocab_size: 100, ffn: {kind: dens}}"},
            [
                "p.yaml:2: model.ffn.kind: got 'dens'; allowed 'dense', 'mome', 'limoe', 'mome_limoe', 'attribute'; did you mean 'dense'?"
            ],
        ),
        (
            {"model": "model: 3"},
            [
                f"p.yaml:2: model: got 3; allowed a mapping with kind {ARCHITECTURES}; change it to a mapping with kind "
                f"{ARCHITECTURES}"
            ],
        ),
        (
            {"parallel": "parallel: {host: zero, zero_stage: 4}"},
            ["p.yaml:3: parallel.zero_stage: got 4; allowed 0, 1, 2 or 3; change it to 0, 1, 2 or 3"],
        ),
        (
            {"parallel": "parallel: {precision: bf61}"},
            ["p.yaml:3: parallel.precision: got 'bf61'; allowed 'auto', 'fp32' or 'bf16'; did you mean 'bf16'?"],
        ),
        (
            {"batch": "batch: {micro_batch_size_per_gpu: true}"},
            [
                "p.yaml:4: batch.micro_batch_size_per_gpu: got true; allowed 'auto' or an integer; change it to 'auto' or an integer"
            ],
        ),
        (
            {"steps": "    steps: 3.0"},
            ["p.yaml:7: stages.0.steps: got 3.0; allowed an integer; change it to 3"],
        ),
        (
            {"steps": "    steps: '3'"},
            ["p.yaml:7: stages.0.steps: got '3'; allowed an integer; change it to 3, without quotes"],
        ),
        (
            {"steps": "    steps:"},
            ["p.yaml:7: stages.0.steps: got null; allowed an integer; write a value or remove the key"],
        ),
        (
            {"steps": "    step: 3"},
            [
                "p.yaml:6: stages.0.steps: got nothing; allowed an integer; add 'steps'",
                f"p.yaml:7: stages.0.step: got an unknown key; allowed {STAGE_KEYS}; did you mean 'steps'?",
            ],
        ),
        (
            {"data": "    data: [{source: emoji, kind: image_txt}]"},
            [
                "p.yaml:8: stages.0.data.0.kind: got 'image_txt'; "
                "allowed 'image_text', 'video_text', 'image_label', 'video_label', 'text', 'image', 'video' or 'images_text'; did you mean 'image_text'?"
            ],
        ),
        (
            {"data": "    data: [{source: emoji, kind: image_text, fields: [3]}]"},
            [
                "p.yaml:8: stages.0.data.0.fields: got a list of 1; allowed a mapping of names to text or a list, each text; change it to a mapping of names to text or a list, each text",
                "p.yaml:8: stages.0.data.0.fields.0: got 3; allowed text; change it to text",
            ],
        ),
        (
            {"data": "    data: {source: emoji}"},
            [
                "p.yaml:8: stages.0.data: got a mapping; allowed a list, each a mapping; change it to a list, each a mapping"
            ],
        ),
        (
            {"objectives": "    objectives: [univcl]"},
            [f"p.yaml:9: stages.0.objectives.0.kind: got 'univcl'; allowed {OBJECTIVES}; did you mean 'univlc'?"],
        ),
        (
            {"objectives": "    objectives: [{weight: 2}]"},
            [f"p.yaml:9: stages.0.objectives.0.kind: got nothing; allowed {OBJECTIVES}; add 'kind'"],
        ),
        (
            {"objectives": "    objectives: [{kind: mlm, probability: 2}]"},
            ["p.yaml:9: stages.0.objectives.0.probability: got 2.0; allowed above 0 and at most 1; change probability"],
        ),
        (
            {"more": "    optimizer: {lr: 0}"},
            ["p.yaml:10: stages.0.optimizer.lr: got 0; allowed more than 0; change the number"],
        ),
        (
            {"more": "    optimizer: {betas: [0.9]}"},
            ["p.yaml:10: stages.0.optimizer.betas.1: got nothing; allowed a number; add it"],
        ),
        (
            {"more": "launch: {processes: atuo}"},
            ["p.yaml:10: launch.processes: got 'atuo'; allowed an integer or 'auto'; did you mean 'auto'?"],
        ),
        (
            {"more": "logging: {tensorboard: no}"},
            ["p.yaml:10: logging.tensorboard: got 'no'; allowed true or false; change it to false"],
        ),
        ({"more": "seed: .nan"}, ["p.yaml:10: seed: got .nan; allowed a finite number; change it to a finite number"]),
        (
            {"more": "name: other"},
            [
                "p.yaml:10: name: got a second 'name' (the first is in line 1); allowed each key once; remove one of the two"
            ],
        ),
        (
            {"model": "model: {preset: tiny}\ntokenizer: nowhere/vocab.txt"},
            [
                "p.yaml:3: tokenizer: got 'nowhere/vocab.txt', which cannot be loaded (tokenizer nowhere/vocab.txt: "
                "cannot be read as a vocabulary: No such file or directory; name a text file with one word per line); "
                "allowed 'emoji', a vocab.txt or the folder of a Hugging Face tokenizer; "
                "name one that is there, or set model.vocab_size"
            ],
        ),
    ],
)
def test_mistakes_are_told_exactly(changed: dict[str, str], message: list[str]) -> None:
    assert problems(plan_text(**changed)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"p.yaml:1: plan: got nothing; allowed a mapping with the keys {PLAN_KEYS}; write a plan"),
        ("- a", f"p.yaml:1: plan: got a list of 1; allowed a mapping with the keys {PLAN_KEYS}; write a plan"),
        (
            "a: [",
            "p.yaml:1: plan: got text that is no YAML (while parsing a flow node expected the node content, "
            "but found '<stream end>'); allowed YAML; change this line or the one above",
        ),
    ],
)
def test_what_is_no_plan_at_all(text: str, message: str) -> None:
    assert problems(text) == [message]


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = plan_text(
        name="name: a b",
        parallel="parallel: {host: pipline}",
        steps="    steps: 0",
        objectives="    objectives: [vlm, mfm]",
        more="seed: 1.5",
    )
    places = [problem.split(": got")[0] for problem in problems(text)]
    assert places == [
        "p.yaml:1: name",
        "p.yaml:3: parallel.host",
        "p.yaml:7: stages.0.steps",
        "p.yaml:9: stages.0.objectives.1.kind",
        "p.yaml:9: stages.0.objectives.0.kind",
        "p.yaml:10: seed",
    ], "rules look at what is around a field of the wrong type"


def test_overrides_go_through_the_same_parser() -> None:
    text = plan_text(more="    optimizer: {lr: 1}\n  - {name: two, steps: 1, data: [], objectives: []}")
    plan = parse_plan(
        text,
        overrides=[
            "stages.one.optimizer.lr=2e-4",
            "stages.1.data=[{source: emoji, kind: image_text}]",
            "stages.two.objectives=[mlm, {kind: univlc}]",
            "stages.two.objectives.mlm.probability=0.5",
            "checkpoint.every=7",
            "model.momentum=null",
        ],
    )
    assert plan.stages[0].optimizer.lr == 2e-4
    assert plan.stages[1].objectives == (MLM(probability=0.5), UniVLC())
    assert plan.checkpoint.every == 7
    assert plan.model.momentum is None
    assert plan.stages[1].model.momentum is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.one.optimizer.lr=x",
            "override 'stages.one.optimizer.lr=x': stages.0.optimizer.lr: got 'x'; allowed a number; "
            "change it to a number",
        ),
        (
            "foo",
            "override 'foo': foo: got no path=value; allowed e.g. stages.0.optimizer.lr=2e-4; write it in this form",
        ),
        ("sed=3", f"override 'sed=3': sed: got an unknown key; allowed {PLAN_KEYS}; did you mean 'seed'?"),
        (
            "stages.onne.steps=3",
            "override 'stages.onne.steps=3': stages.onne: got 'onne', which is no member; "
            "allowed an index up to 0, or 'one'; did you mean 'one'?",
        ),
        (
            "stages.one.steps.x=3",
            "override 'stages.one.steps.x=3': stages.0.steps.x: got a path into 3; allowed a section or a list; "
            "end the override at steps=",
        ),
        (
            "seed=[",
            "override 'seed=[': seed: got text that is no YAML (while parsing a flow node expected the node content, "
            "but found '<stream end>'); allowed YAML; change this line or the one above",
        ),
    ],
)
def test_mistakes_in_overrides_say_so(override: str, message: str) -> None:
    assert message in problems(plan_text(), override)


def test_a_section_that_an_override_makes_is_told_to_be_the_overrides() -> None:
    told = problems(plan_text(), "optimizer.lr=1")
    assert [one.partition(": got")[0] for one in told] == ["override 'optimizer.lr=1': optimizer"]


def test_an_override_mends_the_file() -> None:
    assert parse_plan(plan_text(steps="    steps: x"), overrides=["stages.one.steps=5"]).stages[0].steps == 5


def test_stages_override_shared_sections_field_by_field() -> None:
    text = plan_text(
        model="model: {preset: tiny, vocab_size: 100, momentum: {decay: 0.9}}",
        more="    model: {num_frames: 4, momentum: null}\n    batch: {gradient_accumulation_steps: 2}",
    )
    plan = parse_plan(text)
    (stage,) = plan.stages
    assert (stage.model.num_frames, plan.model.num_frames) == (4, OmniVL.presets["tiny"].num_frames)
    assert stage.model.momentum is None
    assert plan.model.momentum is not None
    assert plan.model.momentum.decay == 0.9
    assert (stage.batch.micro_batch_size_per_gpu, stage.batch.gradient_accumulation_steps) == (4, 2)
    assert stage.samples_per_step(world_size=3) == 24
    assert parse_plan(plan.to_yaml()) == plan


def test_a_mistake_in_a_shared_section_is_told_once() -> None:
    text = plan_text(model="model: {preset: tiny, vocab_size: 100, num_heads: x}")
    text += "\n  - {name: two, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [mlm]}"
    assert problems(text) == ["p.yaml:2: model.num_heads: got 'x'; allowed an integer; change it to an integer"]


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    text = plan_text(model=f"model: {{preset: tiny}}\ntokenizer: {tmp_path / 'vocab.txt'}")
    assert parse_plan(text).model.vocab_size == 8


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, latin = tmp_path / "none.yaml", tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9")
    with pytest.raises(PlanError) as caught:
        load_plan(missing)
    assert str(caught.value) == (
        f"{missing}: got a file that cannot be read (No such file or directory); allowed a YAML file; name a plan"
    )
    with pytest.raises(PlanError) as caught:
        load_plan(latin)
    assert str(caught.value) == (
        f"{latin}: got bytes that are no UTF-8 (at byte 9); allowed UTF-8 text; save the plan as UTF-8"
    )


def test_a_model_file_stands_for_a_preset(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("preset: small\nnum_frames: 4\nmomentum: {decay: 0.9}\n", encoding="utf-8")
    model = f"model: {{preset: {tmp_path / 'model.yaml'}, vocab_size: 100, momentum: {{decay: 0.8}}}}"
    resolved = parse_plan(plan_text(model=model)).model
    assert (resolved.hidden_size, resolved.num_frames, resolved.vocab_size) == (
        OmniVL.presets["small"].hidden_size,
        4,
        100,
    )
    assert resolved.momentum is not None
    assert resolved.momentum.decay == 0.8, "the plan's own fields win"


def test_mistakes_in_a_model_file_are_told_at_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("preset: small\nnum_frames: x\nnum_headz: 3\n", encoding="utf-8")
    found = problems(plan_text(model=f"model: {{preset: {file}, vocab_size: 100}}"))
    assert found[0] == f"{file}:2: model.num_frames: got 'x'; allowed an integer; change it to an integer"
    assert found[1].startswith(
        f"{file}:3: model.num_headz: got an unknown key; allowed kind, momentum, sizes, hidden_size, "
    )
    assert found[1].endswith("; did you mean 'num_heads'?")
    assert len(found) == 2


def test_a_model_file_that_is_not_there() -> None:
    assert problems(plan_text(model="model: {preset: none.yaml, vocab_size: 100}")) == [
        "p.yaml:2: model.preset: got 'none.yaml', which cannot be read (No such file or directory); allowed 'tiny', 'small', 'base', 'large', 'giant' or a YAML file; name a file that is there"
    ]
