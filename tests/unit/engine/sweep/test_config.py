"""Sweep files: which runs they ask for, and what is wrong in them."""

from pathlib import Path

import pytest

from engine.errors import PlanError
from engine.sweep.config import load_sweep

ROOT = Path(__file__).parents[4]
PLAN = ROOT / "configs" / "plans" / "sizes.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text.replace("PLAN", str(PLAN)))
    return path


def test_a_grid_with_exclusions_and_further_points(tmp_path: Path) -> None:
    sweep = load_sweep(
        write(
            tmp_path,
            """
name: s
plan: PLAN
axes:
  width: {narrow: {model.hidden_size: 48}, wide: {model.hidden_size: 96, model.num_heads: 4}}
  seed: [0, 1]
exclude: [{width: wide, seed: 1}]
points: [{width: narrow, seed: 1}, {width: wide, seed: 0}]
compare: width
parallel: 3
""",
        )
    )
    assert [point.name for point in sweep.points] == ["width-narrow_seed-0", "width-narrow_seed-1", "width-wide_seed-0"]
    assert sweep.points[2].overrides == (
        'name="width-wide_seed-0"',
        "model.hidden_size=96",
        "model.num_heads=4",
        "seed=0",
    )
    assert (sweep.parallel, sweep.compare) == (3, "width")
    plan = sweep.points[2].plan
    assert (plan.name, plan.seed, plan.model.hidden_size) == ("width-wide_seed-0", 0, 96)


def test_overrides_of_all_runs_come_first_and_nodes_are_no_field_of_the_plan(tmp_path: Path) -> None:
    text = """
name: s
plan: PLAN
overrides: {seed: 7, model.hidden_size: 48}
axes: {size: {small: {}, large: {model.hidden_size: 96, nodes: 4}}}
"""
    small, large = load_sweep(write(tmp_path, text)).points
    assert small.overrides == ('name="size-small"', "seed=7", "model.hidden_size=48")
    assert large.overrides == ('name="size-large"', "seed=7", "model.hidden_size=96")
    assert (small.nodes, large.nodes) == (None, 4)


def test_a_value_may_name_another_base_plan(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "other.yaml").write_text(PLAN.read_text().replace("name: sizes", "name: other"))
    text = """
name: s
plan: PLAN
overrides: {seed: 7}
axes:
  system: {one: {}, two: {plan: plans/other.yaml, model.hidden_size: 96}}
"""
    sweep = load_sweep(write(tmp_path, text))
    one, two = sweep.points
    assert (one.base, two.base) == (PLAN.resolve(), (tmp_path / "plans" / "other.yaml").resolve())
    assert two.overrides == ('name="system-two"', "seed=7", "model.hidden_size=96")
    assert sweep.plan_for(two, 1).model.hidden_size == 96
    with pytest.raises(PlanError, match=r"sweep.yaml:6: axes.system.two.plan: got 3"):
        load_sweep(write(tmp_path, text.replace("plans/other.yaml", "3")))
    with pytest.raises(PlanError, match=r"sweep.yaml: run 'system-two': .*nothing.yaml"):
        load_sweep(write(tmp_path, text.replace("plans/other.yaml", "plans/nothing.yaml")))


def test_values_that_are_no_file_names(tmp_path: Path) -> None:
    path = write(
        tmp_path, "name: s\nplan: PLAN\naxes: {tokenizer: ['emoji'], 'stages.contrast.optimizer.lr': [1e-3, 5e-4]}"
    )
    names = [point.name for point in load_sweep(path).points]
    assert names == ["tokenizer-emoji_lr-0.001", "tokenizer-emoji_lr-0.0005"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "allowed a mapping with name, plan"),
        ("name: s\nplan: PLAN\naxes: {}", "3: axes: got an empty mapping; allowed a mapping of at least one axis"),
        ("name: s\nplan: PLAN\naxes: {seed: [1], b: []}", "3: axes.b: got an empty list; allowed a list of values, or"),
        ("name: s\nplan: PLAN\naxes: {seed: {a: 1}}", "3: axes.seed: got a mapping; allowed a list of values, or"),
        (
            "name: s\nplan: PLAN\naxis: {seed: [1]}\naxes: {seed: [1]}",
            "3: axis: got an unknown field; allowed name, plan",
        ),
        ("name: ../s\nplan: PLAN\naxes: {seed: [1]}", "1: name: got '../s'; allowed letters, digits"),
        ("name: s\nplan: PLAN\naxes: {seed: [1]}\nparallel: 0", "4: parallel: got 0; allowed 1 or more"),
        ("name: s\nplan: PLAN\naxes: {seed: [1]}\ncompare: lr", "4: compare: got 'lr'; allowed the name of an axis"),
        ("name: s\nplan: PLAN\naxes: {seed: [1]}\nexclude: [{sed: 1}]", "4: exclude.0.sed: got no axis; allowed seed"),
        ("name: s\nplan: PLAN\naxes: {seed: [1]}\nexclude: [{seed: 2}]", "4: exclude.0.seed: got 2; allowed 1"),
        ("name: s\nplan: PLAN\naxes: {seed: [1], b: [1]}\npoints: [{seed: 1}]", "4: points.0: got no value of b"),
        ("name: s\nplan: PLAN\naxes: {model.hiden_size: [1]}", "run 'hiden-size-1': override 'model.hiden_size=1'"),
        ("name: s\nplan: PLAN\noverrides: 3\naxes: {seed: [1]}", "3: overrides: got 3; allowed a mapping of fields"),
        ("name: s\nplan: PLAN\naxes: {nodes: [1, 0]}", "3: axes.nodes: got 0; allowed 1 or more nodes"),
        ("name: s\nplan: nowhere.yaml\naxes: {seed: [1]}", "nowhere.yaml: got a file that cannot be read"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PlanError) as error:
        load_sweep(write(tmp_path, text))
    assert said in str(error.value)


def test_the_sweeps_of_the_project_can_be_read() -> None:
    points = {file.stem: len(load_sweep(file).points) for file in (ROOT / "configs" / "sweeps").glob("*.yaml")}
    assert points == {"emoji_sizes": 16, "icon_counts": 6, "scaling": 9}
