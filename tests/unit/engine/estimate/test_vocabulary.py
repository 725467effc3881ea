"""A plan is looked at without its tokenizer where its model says how many words there are."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.estimate.vocabulary import tokenizer_or_size
from engine.plan.parse import parse_plan
from launcher import cli
from omnivl.errors import DataError

PLAN = """name: run
tokenizer: nowhere/tokenizer
model: {preset: tiny, vocab_size: 100}
parallel: {host: plain, precision: fp32}
stages:
  - {name: one, steps: 3, data: [{source: emoji, kind: image_text}], objectives: [univlc, vlm, mlm, lm]}
"""


def test_the_size_stands_in_for_the_tokenizer() -> None:
    tokenizer = tokenizer_or_size(parse_plan(PLAN, "p"))
    assert tokenizer.special.vocab_size == 100
    assert tokenizer.encode(["a", "b"], 4).tolist() == [[1, 99, 99, 2]] * 2
    with pytest.raises(DataError, match="only the size of its vocabulary is known"):
        tokenizer.decode([1])


@pytest.mark.parametrize("command", [["check", "--offline"], ["estimate", "--nodes", "1", "--gpus-per-node", "2"]])
def test_commands_that_read_no_text(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    told = CliRunner().invoke(cli.app, [command[0], str(tmp_path / "plan.yaml"), *command[1:], "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["stages"]
