"""Every plan and model file that is shipped can be read, and says how it is started and what to expect."""

from pathlib import Path

import pytest

from engine.plan.parse import load_plan
from launcher.slurm.profile import load_profile
from launcher.slurm.script import check_options

CONFIGS = Path(__file__).parents[2] / "configs"
PLANS = sorted((CONFIGS / "plans").glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
CLUSTERS = sorted((CONFIGS / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_a_plan(path):
    plan = load_plan(path)
    assert plan.name == path.stem
    assert plan.stages


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_shipped_model_fits_a_plan(path):
    name = {"debug": "quickstart"}.get(path.stem, "emoji")
    plan = load_plan(CONFIGS / "plans" / f"{name}.yaml", [f"model.preset={path}"])
    assert plan.stages[0].model.num_heads >= 2


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_opens_with_what_to_expect(path):
    head = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for field in ("command:", "hardware:", "time:", "result:"):
        assert field in head, f"{path.name} does not say its {field.rstrip(':')}"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_shipped_cluster_can_be_submitted_to(path):
    profile = load_profile(path)
    check_options(profile.sbatch, str(path))
    assert profile.sbatch["time"] == "24:00:00"
