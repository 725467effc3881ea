"""Numbers out of their ranges: told at their place, all at once, whatever configuration they belong to."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from engine.errors import PlanError
from engine.estimate.hardware import load_hardware
from engine.plan.parse import parse_as, parse_plan
from engine.plan.schema import describe
from engine.plan.yaml import read_yaml
from launcher.slurm.profile import load_profile
from moe.ranges import Range

PLAN = """name: run
model: {preset: tiny, vocab_size: 100}
parallel: {host: zero, precision: fp32}
stages:
  - {name: one, steps: 3, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""


def problems(*overrides: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        parse_plan(PLAN, "p", overrides)
    return [problem.partition("': ")[2] for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("stages.0.steps", "0", "1 or more"),
        ("batch.micro_batch_size_per_gpu", "0", "1 or more, or 'auto'"),
        ("parallel.expert_parallel_size", "0", "1 or more, or 'auto'"),
        ("launch.timeout_seconds", "0", "1 or more"),
        ("guard.spike_factor", "-1", "0 or more"),
        ("loader.max_bad_fraction", "1.5", "from 0 to 1"),
        ("stages.0.data.0.augment.rotate", "200", "from 0 to 180"),
        ("stages.0.data.0.frames.span", "0", "more than 0 and at most 1"),
        ("model.text_length", "2", "3 or more"),
        ("model.patch_dropout", "1", "at least 0 and less than 1"),
        ("model.momentum.decay", "1.1", "from 0 to 1"),
        ("model.vision.norm_eps", "0", "more than 0"),
        ("model.ffn", "{kind: limoe, router: {top_k: 0}}", "1 or more"),
        ("stages.0.optimizer.lr", "0", "more than 0"),
        ("stages.0.optimizer.warmup_steps", "-1", "0 or more"),
        ("stages.0.optimizer.layer_decay", "0", "more than 0 and at most 1"),
    ],
)
def test_a_number_out_of_its_range(path: str, value: str, allowed: str) -> None:
    got, at = ("0", f"{path}.router.top_k") if path == "model.ffn" else (value, path)
    assert problems(f"{path}={value}") == [f"{at}: got {got}; allowed {allowed}; change the number"]


def test_numbers_within_lists_and_mappings() -> None:
    assert problems("stages.0.optimizer.betas=[0.9, 1.0]") == [
        "stages.0.optimizer.betas.1: got 1.0; allowed at least 0 and less than 1; change the number"
    ]
    assert problems("stages.0.evaluate.tasks=[{kind: zero_shot, max_samples: 0}]") == [
        "stages.0.evaluate.tasks.0.max_samples: got 0; allowed 1 or more; change the number"
    ]
    assert problems("model.ffn={kind: mome_limoe, pools: {text: 0}}") == [
        "model.ffn.pools.text: got 0; allowed 1 or more; change the number"
    ]


def test_every_number_is_told_beside_what_else_is_wrong() -> None:
    """A stage without its right number of steps is still looked at."""
    found = problems("stages.0.steps=0", "model.dropout=2", "stages.0.objectives=[vlm]", "seed=x")
    assert {problem.partition(":")[0] for problem in found} == {
        *("stages.0.steps", "model.dropout", "stages.0.objectives.0.kind", "seed")
    }


def test_the_unknown_word_beside_a_range_is_told_by_its_type() -> None:
    assert problems("launch.processes=many") == [
        "launch.processes: got 'many'; allowed an integer or 'auto'; change it to an integer or 'auto'"
    ]


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("grace_seconds: 0")
    with pytest.raises(PlanError, match=r"grace_seconds: got 0; allowed 1 or more; change the number$"):
        load_profile(cluster)
    machine = tmp_path / "machine.yaml"
    written = (Path(__file__).parents[4] / "configs" / "hardware" / "h100.yaml").read_text()
    machine.write_text(re.sub(r"(storage_gigabytes_per_second): .*", r"\1: 0", written))
    with pytest.raises(
        PlanError, match=r"storage_gigabytes_per_second: got 0; allowed more than 0; change the number$"
    ):
        load_hardware(str(machine))


@dataclass(frozen=True)
class _Options:
    share: Annotated[float, Range(0, 1)] = 0.5
    count: Annotated[int, Range(1)] | Literal["auto"] = "auto"


def test_a_configuration_of_ones_own() -> None:
    with pytest.raises(PlanError) as caught:
        parse_as(_Options, read_yaml("share: 2\ncount: 0", "o"))
    assert caught.value.problems == (
        "o:1: share: got 2; allowed from 0 to 1; change the number",
        "o:2: count: got 0; allowed 1 or more, or 'auto'; change the number",
    )


def test_the_reference_shows_the_range() -> None:
    count = Annotated[int, Range(1)] | Literal["auto"]
    assert describe(count, lambda cls: cls.__name__) == "an integer (1 or more) or 'auto'"
    assert describe(count) == "an integer or 'auto'"
