"""Commands that open sources of another user's files, or write jobs that will, ask first; the others open none."""

import json
import os
from pathlib import Path

import pytest
from small_plan import HEAD
from typer.testing import CliRunner, Result

from engine.disk.run_folder import RunFolder
from engine.plan import consent
from engine.plan.parse import load_plan
from launcher.cli import app
from launcher.commands.consent import ALLOW_VARIABLE
from launcher.start import worker
from omnivl.errors import UserError

NEIGHBOUR = 54_321

PLAN = (
    HEAD
    + """    data: [{{source: "pipe:touch {ran}", kind: image_text}}]
    objectives: [{{kind: univlc, queue_size: 8}}]
    evaluate: {{tasks: [{{kind: retrieval, source: "{folder}/*.tar"}}]}}
"""
)


@pytest.fixture
def ran(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def plan(tmp_path, ran) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(vocabulary=tmp_path / "vocab.txt", ran=ran, folder=tmp_path), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path, plan) -> RunFolder:
    """The folder of a complete run, but for its weights."""
    folder = RunFolder(tmp_path / "runs" / "run")
    stage = folder.stage(0, "one")
    stage.path.mkdir(parents=True)
    folder.plan.write_text(load_plan(plan).to_yaml(), encoding="utf-8")
    stage.weights.touch()
    stage.mark_complete(5)
    return folder


@pytest.fixture
def foreign(monkeypatch):
    """Makes files somebody else's."""
    others: set[Path] = set()
    own = consent._owners
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR} if file in others else own(file))
    return others.add


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def said(done: Result) -> str:
    return f"{done.output}{done.exception or ''}"


OPENING = {
    "check": ["check", "PLAN"],
    "pretrain": ["pretrain", "PLAN", "--run-folder", "RUN"],
    "submit": ["submit", "PLAN", "--dry-run", "--run-folder", "RUN"],
}


@pytest.mark.parametrize("command", OPENING.values(), ids=OPENING)
def test_commands_of_plans_ask(plan, ran, tmp_path, foreign, command):
    foreign(plan)
    new = tmp_path / "new"
    done = invoke(*({"PLAN": plan, "RUN": new}.get(word, word) for word in command))
    assert done.exit_code != 0
    assert "stages.one.data.0.source: got" in said(done)
    assert "stages.one.evaluate.tasks.retrieval.source: got" in said(done)
    assert not ran.exists()
    assert not new.exists()


def test_a_worker_asks(plan, ran, foreign, tmp_path, monkeypatch):
    foreign(plan)
    monkeypatch.setattr(worker, "join_launch", lambda by_hand: True)
    with pytest.raises(UserError, match=r"stages\.one\.data\.0\.source: got"):
        worker.run_worker(["--run-folder", str(tmp_path / "new"), "--", str(plan)])
    assert not ran.exists()


def test_a_sweep_asks_for_its_own_file_and_for_its_plan(plan, foreign, tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW_VARIABLE, "0")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"name: s\nplan: {plan.name}\naxes: {{seed: [1, 2]}}\n", encoding="utf-8")
    command = ("sweep", "run", sweep, "--dry-run", "--folder", tmp_path / "new")
    assert invoke(*command).exit_code == 0
    foreign(plan)
    assert "stages.one.data.0.source: got" in said(invoke(*command))
    assert invoke(*command, "--allow-commands").exit_code == 0
    assert os.environ[ALLOW_VARIABLE] == "1", "for the commands that it starts"
    monkeypatch.setenv(ALLOW_VARIABLE, "0")
    foreign(sweep)
    assert "stages.one.data.0.source: got" in said(invoke(*command))


def test_a_sweep_asks_for_the_values_of_its_axes(plan, ran, foreign, tmp_path):
    sweep, base = tmp_path / "sweep.yaml", tmp_path / "base.yaml"
    text = plan.read_text(encoding="utf-8").replace(f"pipe:touch {ran}", "emoji").replace(f"{tmp_path}/*.tar", "emoji")
    base.write_text(text, encoding="utf-8")
    axis = f'axes: {{stages.one.data.0.source: ["pipe:touch {ran}"]}}\n'
    sweep.write_text(f"name: s\nplan: {base.name}\n{axis}", encoding="utf-8")
    foreign(sweep)
    assert "stages.one.data.0.source: got" in said(invoke("sweep", "run", sweep, "--dry-run"))


def test_evaluate_asks_for_the_plan_of_a_run(run, foreign):
    command = ("evaluate", run.path)
    asks = "tasks.retrieval.source: got"
    assert asks not in said(invoke(*command))
    foreign(run.plan)
    assert asks in said(invoke(*command))
    assert asks in said(invoke(*command, "--set", "retrieval.rerank=0"))
    assert asks in said(invoke(*command, "--processes", 2))
    assert asks not in said(invoke(*command, "--allow-commands"))
    assert asks not in said(invoke(*command, "--set", "retrieval.source=emoji"))
    assert asks not in said(invoke(*command, "--set", f"retrieval.source={run.path}/*.tar"))


def test_evaluate_asks_for_files_of_tasks_and_for_plans_of_weights(plan, run, foreign, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks: [{kind: retrieval, source: '/home/*/a.tar'}]", encoding="utf-8")
    foreign(tasks)
    assert "tasks.retrieval.source: got '/home/*/a.tar'" in said(invoke("evaluate", run.path, "--config", tasks))
    foreign(plan)
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    assert "tasks.retrieval.source: got" in said(invoke("evaluate", weights, "--plan", plan))


def test_what_a_cluster_of_somebody_else_runs_is_asked_for(plan, foreign, tmp_path):
    cluster = tmp_path / "cluster.yaml"
    text = "setup: [module load cuda]\nenvironment: {LD_PRELOAD: x.so}\nsbatch: {chdir: /tmp}\ngpus_per_node: 0\n"
    cluster.write_text(text, encoding="utf-8")
    command = ("submit", plan, "--cluster", cluster, "--dry-run", "--offline", "--run-folder", tmp_path / "new")
    assert invoke(*command).exit_code == 0
    foreign(cluster)
    refused = said(invoke(*command))
    assert "setup.0: got 'module load cuda', which is run by bash" in refused
    assert "environment.LD_PRELOAD: got 'x.so'" in refused
    assert "sbatch.chdir: got '/tmp'" in refused
    assert invoke(*command, "--allow-commands").exit_code == 0
    cluster.write_text("gpus_per_node: 0\n", encoding="utf-8")
    assert invoke(*command).exit_code == 0


NOT_OPENING = {
    "estimate": ["estimate", "PLAN", "--json"],
    "upgrade": ["upgrade", "PLAN"],
    "report": ["report", "RUN"],
    "jobs": ["jobs", "RUN"],
    "export": ["export", "RUN", "OUT"],
    "sweep report": ["sweep", "report", "SWEEP"],
}


@pytest.mark.parametrize("command", NOT_OPENING.values(), ids=NOT_OPENING)
def test_the_others_open_no_source_of_a_plan(plan, run, ran, foreign, tmp_path, command):
    (tmp_path / "sweep.yaml").write_text(f"name: s\nplan: {plan.name}\naxes: {{seed: [1, 2]}}\n", encoding="utf-8")
    foreign(plan)
    foreign(run.plan)
    names = {"PLAN": plan, "RUN": run.path, "OUT": tmp_path / "o", "SWEEP": tmp_path / "sweep.yaml"}
    done = invoke(*(names.get(word, word) for word in command))
    assert "allow-commands" not in said(done)
    assert not ran.exists()


def test_check_says_what_a_plan_reaches_for(plan):
    done = invoke("check", plan, "--json", "--offline")
    assert done.exit_code == 0, said(done)
    first, second = json.loads(done.output)["reaches"]
    assert first.startswith("stages.one.data.0.source runs a command: ")
    assert second.startswith("stages.one.evaluate.tasks.retrieval.source reads whatever files match: ")
