"""Plans of the repository, the resolved plan, and the reference."""

from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.plan.parse import load_plan, parse_plan
from engine.plan.plan import Plan
from engine.plan.reference import render, sections
from engine.plan.yaml import read_yaml
from omnivl.docstrings import attribute_texts

ROOT = Path(__file__).parents[4]
PLANS = sorted((ROOT / "configs" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_resolved_plan_reads_back_equal(path: Path) -> None:
    plan = load_plan(path)
    written = plan.to_yaml()
    again = parse_plan(written)
    assert again == plan
    assert again.to_yaml() == written


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_resolved_plan_leaves_nothing_to_defaults(path: Path) -> None:
    plan = load_plan(path)
    tree = read_yaml(plan.to_yaml()).tree
    for stage in tree["stages"]:
        for section in ("model", "parallel", "batch"):
            del stage[section]  # only what differs from the plan's is written there
    assert _keys(tree) == _keys({**asdict(plan), "stages": [_without_shared(asdict(stage)) for stage in plan.stages]})


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_opens_with_its_command_hardware_time_and_result(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("command:", "hardware:", "time:", "result:"):
        assert word in header


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_files_can_stand_for_the_preset(path: Path) -> None:
    """What the plan itself says of the model counts more."""
    own = ROOT / "configs" / "plans" / "quickstart.yaml"
    plan = load_plan(own, [f"model.preset={path}"])
    said, given = (read_yaml(file.read_text(encoding="utf-8")).tree for file in (own, path))
    taken = given.keys() - {"preset"} - said["model"].keys()
    assert taken
    for name in taken:
        assert getattr(plan.model, name) == given[name]
    for name in given.keys() & {"text_layers", "patch_size"}:
        assert getattr(plan.model, name) == said["model"][name]


def test_a_plan_is_frozen() -> None:
    plan = load_plan(ROOT / "configs" / "plans" / "quickstart.yaml")
    for section in (plan, plan.model, plan.stages[0], plan.stages[0].objectives[0]):
        assert is_dataclass(section)
        with pytest.raises(FrozenInstanceError):
            setattr(section, fields(section)[0].name, None)


def test_stages_are_found_by_name() -> None:
    plan = load_plan(ROOT / "configs" / "plans" / "quickstart.yaml")
    assert plan.stage("joint") is plan.stages[2]
    with pytest.raises(KeyError):
        plan.stage("nowhere")


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs" / "plan.md").read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_field_of_every_section_is_told() -> None:
    for cls in sections(Plan):
        untold = {field.name for field in fields(cls)} - set(attribute_texts(cls)) - {"kind"}
        assert not untold, f"{cls.__name__} does not tell of {untold}"


def test_what_the_attributes_say_is_about_fields() -> None:
    for cls in sections(Plan):
        surplus = set(attribute_texts(cls)) - {field.name for field in fields(cls)}
        assert not surplus, f"{cls.__name__} tells of {surplus}, which it has not"


def _keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _keys(value) for key, value in tree.items()}
    return [_keys(value) for value in tree] if isinstance(tree, list | tuple) else None


def _without_shared(stage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key not in ("model", "parallel", "batch")}
