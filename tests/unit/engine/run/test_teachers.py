"""Teachers are found in runs and exported folders, compared with the student, and loaded once."""

from pathlib import Path

import pytest
import torch
from complete_run import write_complete_run

from engine.disk.run_folder import RunFolder
from engine.disk.trained import find_trained, load_encoder
from engine.finished.export import export
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.run.preflight import look_at
from engine.run.teachers import check_teacher, find_teacher, give_teachers
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.objectives.teacher import Taught, TaughtHead, Teacher

TEACHER = """
name: teacher
parallel: {precision: fp32}
tokenizer: emoji
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 1, alignment_layers: 1,
  generation_layers: 1}
stages:
  - {name: one, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [univlc, vlm]}
"""
STUDENT = """
name: student
tokenizer: %s
model: {preset: tiny, hidden_size: 16, num_heads: 2, vision_layers: 1, text_layers: 1, alignment_layers: 1,
  generation_layers: 1%s}
stages:
  - {name: first, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [{kind: itc}]}
  - name: taught
    steps: 1
    data: [{source: emoji, kind: image_text}]
    objectives: [{kind: distil, %s}, {kind: distil_matching, %s}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complete_run(tmp_path_factory.mktemp("runs") / "teacher", TEACHER, stages=1)


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return export(find_trained(run), run.parent / "exported").folder


def student(teacher: str, *, tokenizer: str = "emoji", model: str = "") -> Plan:
    return parse_plan(STUDENT % (tokenizer, model, teacher, teacher))


def chain_of(plan: Plan) -> Chain:
    stage = plan.stages[1]
    return build_chain(stage.model, stage.objectives, load_tokenizer(plan.tokenizer).special)


def teachers(chain: Chain) -> list[Teacher]:
    heads = [one for one in chain.modules() if isinstance(one, TaughtHead)]
    assert all(isinstance(head.teacher, Teacher) for head in heads)
    return [head.teacher for head in heads if isinstance(head.teacher, Teacher)]


def give(plan: Plan, run: Path) -> tuple[Chain, list[str]]:
    chain = chain_of(plan)
    tokenizer = load_tokenizer(plan.tokenizer)
    told = give_teachers(chain, plan, 1, RunFolder(run), tokenizer, torch.device("cpu"), torch.float32)
    return chain, told


def test_a_run_and_its_exported_folder_teach_the_same(run: Path, folder: Path) -> None:
    frames = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    wanted = load_encoder(find_trained(run), torch.device("cpu")).chain.encode_visual(frames)
    for place in (run, folder):
        chain, told = give(student(f"teacher: {place}"), run)
        first, second = teachers(chain)
        assert first is second
        assert (len(told), first.matching) == (1, "vlm")
        with torch.no_grad():
            torch.testing.assert_close(first.chain.encode_visual(frames), wanted)
        assert not any(one.requires_grad for one in first.chain.parameters())


def test_an_earlier_stage_of_the_run_teaches(tmp_path: Path) -> None:
    plan = parse_plan(STUDENT.replace(", {kind: distil_matching, %s}", "") % ("emoji", "", "teacher_stage: first"))
    here = write_complete_run(tmp_path / "student", plan.to_yaml(), stages=1)
    chain, told = give(plan, here)
    assert "taught by stage 'first'" in told[0]
    own = load_encoder(find_trained(here), torch.device("cpu")).chain.state_dict()
    for name, tensor in teachers(chain)[0].chain.state_dict().items():
        torch.testing.assert_close(tensor, own[name], rtol=0, atol=0)
    assert look_at(plan).problems == []


def problem(plan: Plan, place: int = 0) -> str:
    objective = plan.stages[1].objectives[place]
    assert isinstance(objective, Taught)

    def check() -> None:
        found = find_teacher(objective.key, objective, plan, 1)
        check_teacher(found, objective, objective, plan.stages[1], load_tokenizer(plan.tokenizer))

    with pytest.raises(UserError) as raised:
        check()
    return str(raised.value)


def test_a_teacher_with_other_words_or_sizes_is_refused(run: Path, tmp_path: Path) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdef"]) + "\n")
    assert problem(student(f"teacher: {run}", tokenizer=str(words))) == (
        f"objective distil: got teacher {run} (stage 'one') with another tokenizer (4096 words) than the student's (12 "
        "words); allowed is the same, as both read the same ids; name the teacher's in the plan's 'tokenizer', or take "
        "another teacher"
    )
    assert problem(student(f"teacher: {run}", model=", image_size: 32")) == (
        f"objective distil: got teacher {run} (stage 'one') with image_size 64; allowed is the student's, 32, as both "
        "read one batch; change the student's model to it, or take another teacher"
    )


def test_a_teacher_that_is_not_there_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    (one, other) = look_at(student(f"teacher: {tmp_path / 'nothing'}")).problems
    assert one.path == ("stages", 1, "objectives", 0, "teacher")
    assert other.path == ("stages", 1, "objectives", 1, "teacher")
    assert "got a run folder that is not there" in one.text


def test_only_earlier_stages_teach() -> None:
    assert problem(student("teacher_stage: taught")) == (
        "objective distil: got teacher_stage 'taught'; allowed are stages before this one ('first'); name one of them"
    )


def test_folders_of_other_libraries_and_stages_of_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "a folder of another library; allowed is" in problem(student(f"teacher: {tmp_path}"))
    assert "which has no stages; allowed is null; leave it out" in problem(
        student(f"teacher: {folder}, teacher_stage: one")
    )


def test_a_teacher_of_matching_has_a_matching_head(tmp_path: Path) -> None:
    here = write_complete_run(tmp_path / "plain", TEACHER.replace(", vlm]", "]"), stages=1)
    assert "without a matching head; allowed is one that was trained with 'itm' or 'vlm'" in problem(
        student(f"teacher: {here}"), 1
    )
