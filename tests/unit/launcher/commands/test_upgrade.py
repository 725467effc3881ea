"""``omnivl upgrade`` as a user calls it, and what ``omnivl check`` says of earlier fields."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import patience
import pytest

from engine.errors import PlanError
from engine.plan.parse import load_plan
from engine.sweep.config import load_sweep
from engine.sweep.rewrite import rewrite_sweep
from launcher.commands.upgrade import upgrade

OLD = """name: old
model: {preset: tiny, architecture: unified}  # one transformer
parallel: {host: plain, precision: fp32}
stages:
  - name: a
    steps: 4
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc]
"""
SWEEP = """# Experts
name: experts
plan: old.yaml
overrides: {model.vision_layers: 2}  # few
axes:
  ffn:
    dense: {}
    sparse: {model.ffn: {kind: limoe, num_experts: 4, top_k: 1}}  # by tokens
  model.ffn.noise: [0.5, 1.0]  # of routers
exclude:
  - {ffn: dense, model.ffn.noise: 1.0}
compare: model.ffn.noise
"""


def omnivl(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    return patience.run(command, capture_output=True, text=True, limit=120, cwd=folder)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


def test_a_diff_then_the_file_then_nothing(plan: Path) -> None:
    before = load_plan(plan)
    plan.chmod(0o640)
    shown = omnivl("upgrade", "old.yaml", folder=plan.parent)
    assert shown.returncode == 1
    assert shown.stdout.splitlines()[:5] == [
        "--- old.yaml",
        "+++ old.yaml",
        "@@ -1,5 +1,5 @@",
        " name: old",
        "-model: {preset: tiny, architecture: unified}  # one transformer",
    ]
    assert plan.read_text() == OLD
    written = omnivl("upgrade", "old.yaml", "--write", folder=plan.parent)
    assert (written.returncode, written.stdout) == (0, "old.yaml: rewritten (1 field)\n")
    assert plan.read_text() == OLD.replace("architecture", "kind")
    assert load_plan(plan) == before
    assert stat.S_IMODE(plan.stat().st_mode) == 0o640
    assert [path.name for path in plan.parent.iterdir()] == ["old.yaml"], "nothing is left beside it"
    again = omnivl("upgrade", "old.yaml", folder=plan.parent)
    assert (again.returncode, again.stdout) == (0, "old.yaml: is of today's spelling\n")


def test_check_tells_the_lines_and_the_command(plan: Path) -> None:
    told = omnivl("check", "old.yaml", folder=plan.parent)
    assert told.returncode == 0
    assert told.stdout.endswith(
        "Fields of earlier spelling, which are read as those of today:\n"
        "old.yaml:2: model.architecture is model.kind today\n"
        "`omnivl upgrade old.yaml --write` rewrites them.\n"
    )
    found = json.loads(omnivl("check", "old.yaml", "--json", folder=plan.parent).stdout)["earlier_fields"]
    assert found == {"old.yaml": ["old.yaml:2: model.architecture is model.kind today"]}


def test_a_mistake_in_one_file_keeps_all_as_they_are(plan: Path) -> None:
    (plan.parent / "hardware.yaml").write_text("memory_gib: 80\n")
    refused = omnivl("upgrade", "old.yaml", "hardware.yaml", "--write", folder=plan.parent)
    assert refused.returncode == 2
    assert refused.stderr == (
        "hardware.yaml:1: got a mapping that is none of these; allowed a plan (stages), a sweep (axes) or a model "
        "file; name one\n"
    )
    assert plan.read_text() == OLD
    missing = omnivl("upgrade", "missing.yaml", folder=plan.parent)
    assert missing.returncode == 2
    assert missing.stderr.startswith("missing.yaml: got a file that cannot be read (No such file or directory)")


def test_a_failing_disk_keeps_the_old_file(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        upgrade([plan], write=True)
    assert plan.read_text() == OLD
    assert list(plan.parent.iterdir()) == [plan]


def test_the_target_of_a_link_is_rewritten(plan: Path) -> None:
    link = plan.parent / "link.yaml"
    link.symlink_to(plan.name)
    upgrade([link], write=True)
    assert link.is_symlink() and "kind: unified" in plan.read_text()


def test_a_model_file_is_named_and_rewritten(plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = plan.parent / "model.yaml"
    model.write_text("preset: tiny\narchitecture: unified\n")
    plan.write_text(OLD.replace("preset: tiny, architecture: unified", f"preset: {model}"))
    upgrade([plan])
    printed = capsys.readouterr()
    assert printed.out == f"{plan}: is of today's spelling\n"
    assert printed.err == f"{model}, which {plan} names, holds earlier fields as well: omnivl upgrade {model}\n"
    upgrade([model], write=True)
    assert model.read_text() == "preset: tiny\nkind: unified\n"


def test_a_sweep_keeps_its_runs_and_their_names(plan: Path) -> None:
    plan.write_text(OLD.replace("preset: tiny", "ffn: {kind: limoe, num_experts: 4}, preset: tiny"))
    path = plan.parent / "sweep.yaml"
    path.write_text(SWEEP)
    before = load_sweep(path)
    done = rewrite_sweep(SWEEP, path)
    assert done.text == (
        SWEEP.replace("vision_layers", "depth")
        .replace("top_k: 1", "router: {kind: token_choice, top_k: 1}")
        .replace("model.ffn.noise", "model.ffn.router.noise")
    )
    path.write_text(done.text)
    assert [(one.name, one.plan) for one in load_sweep(path).points] == [(one.name, one.plan) for one in before.points]
    assert rewrite_sweep(done.text, path).text == done.text


def test_an_axis_that_would_rename_runs_is_refused(plan: Path) -> None:
    text = "name: depths\nplan: old.yaml\naxes: {model.vision_layers: [2, 4]}\n"
    with pytest.raises(PlanError) as caught:
        rewrite_sweep(text, plan.parent / "sweep.yaml")
    (problem,) = caught.value.problems
    assert problem == (
        f"{plan.parent / 'sweep.yaml'}:3: axes.model.vision_layers: got an axis whose runs are named for a field of "
        "earlier spelling; allowed one whose rewriting keeps their names; write an axis 'vision_layers' of named "
        "values, each with model.depth"
    )
