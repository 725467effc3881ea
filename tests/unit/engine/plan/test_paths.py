"""Paths of plans and of the command line as people write them."""

from pathlib import Path

import pytest

from engine.disk.run_folder import RunFolder, RunFolderError
from engine.plan.parse import parse_plan
from launcher.cli import with_paths_expanded

PLAN = """name: run
model: {preset: tiny, vocab_size: 100}
parallel: {host: plain, precision: fp32}
tokenizer: ~/words.txt
loader: {index_cache: $CACHE/index}
stages:
  - {name: one, steps: 3, data: [SOURCES], objectives: [univlc], weights: {vision: ~/vit}}
"""
_SOURCES = ("~/a.tar", "${CACHE}/b.tar", "s3://b/$CACHE.tar", "pipe:cat $CACHE", "$NOWHERE/c.tar")


def test_paths_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CACHE", "/c")
    monkeypatch.delenv("NOWHERE", raising=False)
    entries = ", ".join(f"{{source: '{source}', kind: image_text, name: n{n}}}" for n, source in enumerate(_SOURCES))
    plan = parse_plan(PLAN.replace("SOURCES", entries), "p", ["tokenizer=~/more.txt"])
    assert plan.tokenizer == "/home/me/more.txt"
    assert plan.loader.index_cache == "/c/index"
    assert plan.stages[0].weights.vision == "/home/me/vit"
    assert [entry.source for entry in plan.stages[0].data] == [
        *("/home/me/a.tar", "/c/b.tar", "s3://b/$CACHE.tar", "pipe:cat $CACHE", "$NOWHERE/c.tar")
    ]


def test_paths_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CACHE", "/c")
    given = ["pretrain", "~/p.yaml", "--run-folder=~/x", "--out", "$CACHE/y", "tokenizer=~/t", "--stage=a"]
    assert with_paths_expanded(given) == [
        *("pretrain", "/home/me/p.yaml", "--run-folder=/home/me/x", "--out", "/c/y", "tokenizer=~/t", "--stage=a")
    ]


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with (
            pytest.raises(RunFolderError, match=r"--run-folder: got .* in which nothing can be written"),
            RunFolder(path).lock(),
        ):
            pass


def test_a_run_folder_that_cannot_be_written() -> None:
    with pytest.raises(RunFolderError, match="in which nothing can be written"), RunFolder(Path("/proc/run")).lock():
        pass
