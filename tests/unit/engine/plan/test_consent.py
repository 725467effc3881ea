"""Sources of another user's plan that run a command, fetch an address or expand a glob."""

import os
import stat
import sys
from pathlib import Path

import patience
import pytest
from small_plan import HEAD

from engine.errors import PlanError
from engine.plan import consent
from engine.plan.consent import reaches, require_consent
from engine.plan.parse import load_plan

NEIGHBOUR = 54_321

PLAN = (
    HEAD
    + """    data:
      - {{source: emoji, kind: image_text}}
      - {{source: "{source}", kind: image_text, name: pairs}}
    objectives: [{{kind: univlc, queue_size: 8}}]
    evaluate: {{tasks: [{{kind: retrieval, source: "{task}"}}]}}
"""
)


@pytest.fixture
def write(tmp_path):
    def write(source: str, task: str = "emoji") -> Path:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cat", "dog"]
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        path = tmp_path / "plan.yaml"
        path.write_text(PLAN.format(vocabulary=tmp_path / "vocab.txt", source=source, task=task), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("source", "does"),
    [
        ("pipe:touch FILE", "runs a command"),
        ("s3://bucket/{0..9}.tar", "is fetched from elsewhere"),
        ("gs://bucket/x.tar", "is fetched from elsewhere"),
        ("HTTPS://host/x.tar", "is fetched from elsewhere"),
        ("/home/*/x.tar", "reads whatever files match"),
        ("data/[ab].tar", "reads whatever files match"),
    ],
)
def test_what_a_plan_of_another_user_may_not_do_unasked(write, monkeypatch, source, does):
    path = write(source)
    plan = load_plan(path)
    require_consent(plan, [path], allowed=False)  # it is the user's own
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    with pytest.raises(PlanError) as error:
        require_consent(plan, [path], allowed=False)
    assert list(error.value.problems) == [
        f"{path}: stages.one.data.pairs.source: got {source!r}, which {does}, in a file of user {NEIGHBOUR}; allowed in "
        "a file of your own; read it, and add --allow-commands if you trust it"
    ]
    require_consent(plan, [path], [f"stages.one.data.pairs.source={source}"], allowed=False)


@pytest.mark.parametrize("source", ["data/x.tar", "data/{000..127}.tar", "data", "emoji"])
def test_named_files_need_no_consent(write, monkeypatch, source):
    path = write(source)
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    require_consent(load_plan(path), [path], allowed=False)
    assert reaches(load_plan(path)) == []


def test_sources_of_evaluation_count(write):
    (found,) = reaches(load_plan(write("emoji", task="data/*.tar")))
    assert found.source == "data/*.tar"
    assert found.path.startswith("stages.one.evaluate.tasks.")


def test_root_is_trusted_and_files_that_are_gone_are_not(write, monkeypatch):
    path = write("pipe:cat x")
    plan = load_plan(path)
    path.unlink()
    with pytest.raises(PlanError, match="in a file of user nobody, since it is gone; allowed"):
        require_consent(plan, [path], allowed=False)
    require_consent(plan, [path], allowed=True)
    monkeypatch.setattr(consent, "_owners", lambda file: {0})
    require_consent(plan, [path], allowed=False)


def test_a_link_of_another_user_is_no_file_of_ones_own(write, tmp_path, monkeypatch):
    path = write("pipe:cat x")
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    require_consent(load_plan(link), [link], allowed=False)
    own = Path.lstat
    fields = (stat.S_IFLNK | 0o777, 1, 1, 1, NEIGHBOUR, NEIGHBOUR, 0, 0, 0, 0)
    monkeypatch.setattr(Path, "lstat", lambda file: os.stat_result(fields) if file == link else own(file))
    with pytest.raises(PlanError, match=f"in a file of user {NEIGHBOUR}; allowed"):
        require_consent(load_plan(link), [link], allowed=False)


SOURCE = "pipe:cat a.tar"
FIELD = "stages.one.data.pairs.source"


@pytest.mark.parametrize(
    "override",
    [
        f"{FIELD}={SOURCE}",
        f"stages.0.data.1.source={SOURCE}",
        f"stages.one.data.pairs={{source: '{SOURCE}', kind: image_text, name: pairs}}",
        f"stages.one.data=[emoji, {{source: '{SOURCE}'}}]",
    ],
)
def test_an_override_that_writes_the_source_is_the_users_own_wish(write, monkeypatch, override):
    path = write(SOURCE)
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    require_consent(load_plan(path), [path], [override], allowed=False)


@pytest.mark.parametrize(
    "override",
    [
        "name=p",
        f"name={SOURCE}",
        f"name='{FIELD}={SOURCE}'",
        f"stages.one.data.pairs.name={SOURCE}",
        f"stages.one.data.0.source={SOURCE}",
        f"stages.one.data.pairs.source={SOURCE}x",
        f"stages.one.data.pairs.source.more={SOURCE}",
        f"stages.one.data.pairs={SOURCE}",
        f"stages.one.data.pairs={{name: '{SOURCE}'}}",
        f"stages.one.data=['{SOURCE}']",
        f"stages.one.data=[{{source: '{SOURCE}'}}]",
        f"stages.one.evaluate.tasks.retrieval.source={SOURCE}",
        SOURCE,
        "",
    ],
)
def test_an_override_that_only_contains_the_source_excuses_nothing(write, monkeypatch, override):
    path = write(SOURCE)
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    with pytest.raises(PlanError, match=f"{FIELD}: got"):
        require_consent(load_plan(path), [path], [override], allowed=False)


def test_an_override_excuses_its_own_field_alone(write, monkeypatch):
    path = write("data/*.tar", task="data/*.tar")
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    with pytest.raises(PlanError) as error:
        require_consent(load_plan(path), [path], [f"{FIELD}=data/*.tar"], allowed=False)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}: stages.one.evaluate.tasks.retrieval.source: got 'data/*.tar'")


def test_paths_of_overrides_are_compared_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path, override = write("emoji"), f"{FIELD}=~/*.tar"
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    require_consent(load_plan(path, [override]), [path], [override], allowed=False)


def test_what_exists_by_its_name_is_no_glob(write, tmp_path, monkeypatch):
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR})
    for name in ("a[1].tar", "b[1].tar", "c[1].tar"):
        (tmp_path / name).touch()
    (tmp_path / "folder[x]").mkdir()
    for source in ("a[1].tar", "{a,b}[1].tar", "{a,b,c}[1].tar", "folder[x]"):
        path = write(str(tmp_path / source))
        require_consent(load_plan(path), [path], allowed=False)
    for source in ("[ab].tar", "{a,d}[1].tar", "a[[]1].tar"):
        path = write(str(tmp_path / source))
        with pytest.raises(PlanError, match="reads whatever files match"):
            require_consent(load_plan(path), [path], allowed=False)


def test_one_foreign_file_of_several_is_enough(write, monkeypatch):
    path = write("pipe:cat x")
    monkeypatch.setattr(consent, "_owners", lambda file: {NEIGHBOUR if file.name == "sweep.yaml" else os.geteuid()})
    with pytest.raises(PlanError, match=r"sweep\.yaml: stages"):
        require_consent(load_plan(path), [path, path.with_name("sweep.yaml")], allowed=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_that_really_is_another_users(write, tmp_path):
    path = write(f"pipe:touch {tmp_path}/ran")
    os.chown(path, NEIGHBOUR, NEIGHBOUR)
    command = [sys.executable, "-m", "launcher.cli", "pretrain", str(path), "--run-folder", str(tmp_path / "run")]
    done = patience.run(command, limit=300, capture_output=True, text=True)
    assert done.returncode == 2
    assert "add --allow-commands" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
