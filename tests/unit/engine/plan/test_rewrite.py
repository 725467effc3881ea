"""Plans and model files of earlier spelling come out in today's: equal when read, with all their comments."""

from collections import Counter
from pathlib import Path

import pytest

from engine.errors import PlanError
from engine.plan.parse import parse_plan
from engine.plan.rewrite import earlier_fields, rewrite_model_file, rewrite_plan
from engine.plan.yaml import mark

REST = """parallel: {host: plain, precision: fp32}
stages:
  - name: a  # the first
    steps: 4
    data: &data [{source: emoji, kind: image_text}]
    objectives: [univlc]
"""
BLOCK = """# A header

name: p  # of the folder
model:
  preset: tiny

  # one transformer
  architecture: unified  # as in VLMo
  vision_layers: 2   # of its depth
  text_layers: 1     # means nothing
  # of experts
  ffn:
    kind: limoe
    # each token's
    top_k: 2   # experts
    num_experts: 4

    # of the capacity
    capacity_factor: 1.5
    noise: 0.5
    losses:  # several

      # the first
      z: 1e-3
# out of line
      load: 0.1  # the last
        # deeper
    every: 1  # all blocks
"""
FLOW = """name: p
model: {architecture: unified, preset: tiny, ffn: {kind: limoe, noise: 0.5, num_experts: 4, losses: &losses {z: 0.1}}}
"""
LINES = """name: p
model: {preset: tiny, architecture: towers, # two of them
  ffn: {
    kind: limoe,
    top_k: 2,  # two, of four
    num_experts: 4,
    # none
    noise: 0.5
    , # and
    losses: {z: 0.1, # little
      load: 0.1,  # none, of this
      },
  },
}
"""
CHOICE = """name: p
model:
  preset: tiny
  architecture: unified
  ffn:
    kind: limoe
    num_experts: 4
    routing: expert_choice  # by experts
    top_k: 2  # on average
    capacity_factor: 1.5  # times as many
    noise: 0  # is not there
    losses:  # of which one goes
      load: 0  # this
      z: 0.1
"""
STAGES = (
    BLOCK
    + REST
    + """    model: {vision_layers: 3, text_layers: 9, ffn: {top_k: 1, capacity_factor: 1.5}}
  - name: b
    steps: 4
    data: *data
    objectives: [univlc]
    model:
      text_layers: 2  # nothing
  - name: c
    steps: 4
    data: *data
    objectives: [univlc]
    model:
      architecture: unified
      ffn:
        kind: limoe
        num_experts: 4
        losses: &losses {z: 0.1}
  - name: d
    steps: 4
    data: *data
    objectives: [univlc]
    model: {ffn: {kind: mome_limoe, pools: {image: 2}, common_experts: 2, losses: *losses, top_k: 2}}
"""
)
PLANS = {
    "block": BLOCK + REST,
    "flow": FLOW + REST,
    "lines": LINES + REST,
    "choice": CHOICE + REST,
    "stages": STAGES,
    "quoted": "name: p\nmodel: {'architecture': 'unified', \"vision_layers\": 2, preset: tiny}\n" + REST,
    "ends of lines": (BLOCK + REST).replace("\n", "\r\n"),
    "no last end": "name: p\n" + REST + "model:\n  preset: tiny\n  ffn:\n    kind: limoe\n    top_k: 2",
}


def comments(text: str) -> Counter[str]:
    return Counter(comment for _, comment in mark(text).comments)


@pytest.mark.parametrize("name", PLANS)
def test_a_rewritten_plan_is_equal_and_has_all_comments(name: str) -> None:
    old = PLANS[name]
    done = rewrite_plan(old, "p")
    assert done.text != old
    assert parse_plan(done.text) == parse_plan(old)
    assert comments(done.text) == comments(old)
    assert earlier_fields(done.text, "p") == {}
    assert rewrite_plan(done.text, "p").text == done.text
    assert ("\r\n" in old) == ("\r\n" in done.text) and done.text.count("\r\n") in (0, done.text.count("\n"))


def test_blocks_keep_their_order_and_their_comments_beside_them() -> None:
    assert rewrite_plan(BLOCK + REST, "p").text == (
        """# A header

name: p  # of the folder
model:
  preset: tiny

  # one transformer
  kind: unified  # as in VLMo
  depth: 2   # of its depth
  # means nothing
  # of experts
  ffn:
    kind: limoe
    router:
      kind: token_choice
      # each token's
      top_k: 2   # experts
      # of the capacity
      capacity_factor: 1.5
      noise: 0.5
      losses:  # several

        # the first
        z: 1e-3
  # out of line
        load: 0.1  # the last
          # deeper
    num_experts: 4

    every: 1  # all blocks
"""
        + REST
    )


def test_braces_keep_their_commas() -> None:
    assert rewrite_plan(FLOW + REST, "p").text.splitlines()[1] == (
        "model: {kind: unified, preset: tiny, ffn: {kind: limoe, router: {kind: token_choice, noise: 0.5, "
        "losses: &losses {z: 0.1}}, num_experts: 4}}"
    )
    assert rewrite_plan(LINES + REST, "p").text == (
        """name: p
model: {preset: tiny, kind: omnivl, # two of them
  ffn: {
    kind: limoe,
    router: {kind: token_choice, top_k: 2, noise: 0.5, losses: {z: 0.1, # little
      load: 0.1,  # none, of this
      }},  # two, of four
    num_experts: 4,
    # none
     # and
  },
}
"""
        + REST
    )


def test_a_stage_that_says_nothing_any_more_keeps_its_comments() -> None:
    text = rewrite_plan(STAGES, "p").text
    assert "    model: {depth: 3, ffn: {router: {top_k: 1}}}\n" in text
    assert "    model:\n      # nothing\n      {}\n" in text
    assert "common_experts: 2, router: {kind: token_choice, losses: *losses, top_k: 2}}}\n" in text


def test_a_section_that_stands_in_two_places_is_rewritten_once() -> None:
    stage = "    steps: 4\n    data: [{source: emoji, kind: image_text}]\n    objectives: [univlc]\n"
    old = (
        "name: p\nparallel: {host: plain, precision: fp32}\nstages:\n"
        + f"  - name: a\n{stage}    model: {{ffn: &experts {{kind: limoe, top_k: 2}}}}\n"
        + f"  - name: b\n{stage}    model: {{ffn: *experts}}\n"
    )
    done = rewrite_plan(old, "p")
    assert done.text == old.replace("top_k: 2", "router: {kind: token_choice, top_k: 2}")
    assert len(done.earlier) == 2


def test_each_earlier_field_is_told_with_its_line() -> None:
    assert rewrite_plan(CHOICE + REST, "old.yaml").earlier == (
        "old.yaml:4: model.architecture is model.kind today",
        "old.yaml:8: model.ffn.routing is model.ffn.router.kind today",
        "old.yaml:9: model.ffn.top_k is model.ffn.router.experts_per_token today",
        "old.yaml:10: model.ffn.capacity_factor is model.ffn.router.experts_per_token today",
        "old.yaml:11: model.ffn.noise is model.ffn.router.noise today",
        "old.yaml:12: model.ffn.losses is model.ffn.router.losses today",
    )
    told = earlier_fields(BLOCK + REST, "old.yaml")["old.yaml"]
    assert "old.yaml:10: model.text_layers means nothing to the architecture 'unified'" in told
    assert earlier_fields(LINES + REST, "old.yaml")["old.yaml"][0] == (
        "old.yaml:2: model.architecture is model.kind today, with the value omnivl"
    )


def test_a_plan_of_today_stays_as_it_is() -> None:
    text = "name: p\nmodel: {preset: tiny, kind: unified, ffn: {kind: limoe, router: {kind: token_choice}}}\n" + REST
    assert rewrite_plan(text, "p").text == text
    assert rewrite_plan("name: p\n" + REST, "p").earlier == ()


def refused(text: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        rewrite_plan(text, "old.yaml")
    return list(caught.value.problems)


def test_what_cannot_be_rewritten_is_refused_with_its_line() -> None:
    beside = "name: p\nmodel: {preset: tiny, ffn: {kind: limoe,\n  noise: 0.5, router: {top_k: 2}}}\n"
    assert refused(beside + REST) == [
        "old.yaml:3: model.ffn.noise: got an option of its router beside router, in a field of earlier spelling; allowed "
        "one that can be rewritten; write it below router"
    ]
    alias = REST.replace("name: a", "name: &towers towers").replace("  # the first", "")
    assert refused("name: p\n" + alias + "model:\n  preset: tiny\n  architecture: *towers\n") == [
        "old.yaml:10: model.architecture: got an alias, in a field of earlier spelling; allowed one that can be rewritten; "
        "write its value out"
    ]
    stage = "    model: &model {ffn: {kind: limoe, top_k: 2}}\n"
    assert refused("name: p\n" + REST + stage + "model: *model\n") == [
        "old.yaml:1: got an alias of a section of earlier spelling that means another thing in each place; change by "
        "hand: old.yaml:8: stages.0.model.ffn.top_k is stages.0.model.ffn.router.top_k today; "
        "old.yaml:8: model.ffn.top_k is model.ffn.router.top_k today"
    ]


def test_a_comment_that_would_be_lost_is_refused() -> None:
    text = """name: p
model: {preset: tiny, ffn: {kind: limoe, routing: expert_choice, losses: {load: 0, # gone
  z: 0.1}}}
"""
    assert refused(text + REST) == [
        "old.yaml:1: got comments inside of what has to be written anew ('# gone'); change by hand: "
        "old.yaml:2: model.ffn.routing is model.ffn.router.kind today; "
        "old.yaml:2: model.ffn.losses is model.ffn.router.losses today"
    ]


def test_mistakes_of_the_plan_come_first() -> None:
    assert refused("name: p\n---\nname: q\n")[0].startswith(
        "old.yaml:2: plan: got text that is no YAML (expected a single"
    )
    assert refused(FLOW.replace("0.5", "loud") + REST)[0].startswith("old.yaml:2: model.ffn.router.noise: got 'loud'")


def test_a_model_file_is_rewritten_by_itself(tmp_path: Path) -> None:
    old = "# a model\npreset: tiny\narchitecture: unified\nvision_layers: 2\nffn:\n  kind: limoe\n  top_k: 2  # two\n"
    file = tmp_path / "model.yaml"
    file.write_text(old)
    plan = f"name: p\nmodel: {{preset: {file}}}\n" + REST
    before = parse_plan(plan)
    assert rewrite_plan(plan, "p").others == (str(file),)
    assert earlier_fields(plan, "p")[str(file)][0] == f"{file}:3: architecture is kind today"
    file.write_text(rewrite_model_file(old, str(file)).text)
    assert file.read_text() == (
        "# a model\npreset: tiny\nkind: unified\ndepth: 2\n"
        "ffn:\n  kind: limoe\n  router:\n    kind: token_choice\n    top_k: 2  # two\n"
    )
    assert parse_plan(plan) == before
    assert rewrite_plan(plan, "p").others == ()


def test_a_part_over_a_model_file_of_earlier_spelling_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("preset: tiny\nffn: {kind: limoe, top_k: 2}\n")
    (problem,) = refused(f"name: p\nmodel: {{preset: {file}, ffn: {{top_k: 1}}}}\n" + REST)
    assert "cannot be rewritten by themselves" in problem
    assert "old.yaml:2: model.ffn.top_k is model.ffn.router.top_k today" in problem
