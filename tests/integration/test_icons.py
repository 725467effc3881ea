"""The plan and the sweep of the icons on a package in miniature: from the archive to scores and a page."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import patience
import pytest
import yaml
from icon_package import SETS, write_package

from engine.plan.parse import load_plan
from engine.sweep.config import load_sweep
from launcher.commands.check import summarize
from omnivl.data.icons.build import build_icons

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SHAPE = '<rect x="{x}" width="8" height="{h}" fill="currentColor"/>'
TINY = ["model.image_size=32", "batch.micro_batch_size_per_gpu=4", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the plans, and icons in ``data/icons`` as the plan names them."""
    folder = tmp_path_factory.mktemp("icons")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shapes = {f"thing{n}": {"body": SHAPE.format(x=n % 8, h=4 + n % 12)} for n in range(120)}
    more = {"alpha": (SETS["alpha"][0], {"icons": shapes}), "twemoji": (SETS["twemoji"][0], {"icons": dict(shapes)})}
    more["twemoji"][1]["icons"] |= {f"thing{n}": {"body": SHAPE.format(x=n % 8 + 0.5, h=3)} for n in range(120)}
    write_package(folder / "icons.tgz", more)
    report = build_icons(folder / "data" / "icons", folder / "icons.tgz", processes=1)
    assert report.counts["hand"] == {"seen": 120, "unseen": 120}
    return folder


def omnivl(folder: Path, *words: str) -> str:
    done = patience.run(
        [sys.executable, "-m", "launcher.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        limit=200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_plan_passes_its_check_without_data(tmp_path: Path) -> None:
    summary = summarize(load_plan(ROOT / "configs" / "plans" / "icons.yaml", world_size=1), 1)
    assert [stage["name"] for stage in summary["stages"]] == ["contrast"]


def test_the_sweep_goes_from_a_thousand_icons_to_all() -> None:
    points = load_sweep(ROOT / "configs" / "sweeps" / "icon_counts.yaml").points
    wheres = [point.plan.stages[0].data[0].where for point in points]
    assert [point.values["icons"] for point in points] == ["k1", "k3", "k10", "k30", "k100", "all"]
    shares = [float(where["share"][0].removeprefix("< ")) if "share" in where else 1.0 for where in wheres]
    trained_on = 295_529  # seen hands, names of split train
    assert [round(share * trained_on, -3) for share in shares] == [1000, 3000, 10_000, 30_000, 100_000, 296_000]
    assert all((where["hand"], where["split"]) == (("seen",), ("train",)) for where in wheres)


@pytest.mark.full
def test_the_plan_trains_on_icons_and_evaluates_on_what_is_held_out(folder: Path) -> None:
    words = [*TINY, "stages.contrast.steps=3", "stages.contrast.optimizer.warmup_steps=1"]
    omnivl(folder, "pretrain", "configs/plans/icons.yaml", *words)
    run = folder / "runs" / "icons" / "stages" / "01-contrast"
    found = json.loads((run / "evaluation.json").read_text())
    text = json.dumps(found)
    for name in ("unseen hand", "unseen names", "unseen names by an unseen hand"):
        assert f'"{name}"' in text, text[:400]
    assert "image->text R@1" in text


@pytest.mark.full
def test_the_sweep_runs_from_its_file_to_its_page(folder: Path) -> None:
    path = folder / "configs" / "sweeps" / "icon_counts.yaml"
    sweep = yaml.safe_load(path.read_text())
    sweep["overrides"] = {
        "model.image_size": 32,
        "batch.micro_batch_size_per_gpu": 4,
        "stages.contrast.steps": 2,
        "stages.contrast.optimizer.warmup_steps": 1,
    }
    axis = sweep["axes"]["icons"]
    sweep["axes"]["icons"] = {name: axis[name] for name in ("k100", "all")}
    path.write_text(yaml.safe_dump(sweep))
    assert "2 of 2 runs to do" in omnivl(folder, "sweep", "run", str(path))
    omnivl(folder, "sweep", "report", str(path))
    assert list((folder / "runs" / "sweeps" / "icon_counts").glob("sweep.html"))
