"""Consoles and tables: strings are texts, harmless to the terminal, and no name is cut."""

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from engine.telemetry.console import PlainConsole, PlainTable, plain_text, say, titled

ATTACKS = {
    "[/nope]": "[/nope]",
    "[bold]x": "[bold]x",
    "[link=http://x]y[/link]": "[link=http://x]y[/link]",
    ":smile:": ":smile:",
    "\x1b[2J\x1b[31m": r"\x1b[2J\x1b[31m",
    "\x1b]8;;http://x\x07y": r"\x1b]8;;http://x\x07y",
    "\x9b31m": r"\x9b31m",
    "a\r\x08b": r"a\r\x08b",
    "\u202eabc": r"\u202eabc",
    "\ud800": r"\ud800",
}


def printed(*things: Any, width: int | None = 80, console: type[Console] = PlainConsole) -> str:
    file = io.StringIO()
    one = console(file=file, width=width)
    for thing in things:
        one.print(thing)
    return file.getvalue()


@pytest.mark.parametrize(("text", "shown"), ATTACKS.items())
def test_strings_are_texts_wherever_they_stand(text: str, shown: str) -> None:
    table = PlainTable(text, title=text)
    table.add_row(text)
    assert printed(text) == shown + "\n"
    assert printed(titled(text, text)) == shown + shown + "\n"
    for console in (PlainConsole, Console) if text != ":smile:" else (PlainConsole,):
        assert printed(table, console=console).count(shown) == 3


@pytest.mark.parametrize("text", ATTACKS)
def test_a_status_is_a_text(text: str) -> None:
    file = io.StringIO()
    with PlainConsole(file=file).status(f"reading {text}") as status:
        status.update(plain_text(text))
    assert "\x1b[2J" not in file.getvalue()


NAME = "a-name-without-spaces-as-shards-and-tasks-have-them-" + "x" * 60


def test_no_name_is_cut_in_80_columns_nor_in_a_pipe() -> None:
    table = PlainTable("name", title="T")
    for heading in ("one", "two", "three"):
        table.add_column(heading, justify="right")
    table.add_row(NAME, "1,234,567", "0.1234567", "12")
    narrow, piped = printed(table), printed(table, width=None)
    assert "\u2026" not in narrow + piped
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert NAME in "".join(line.strip().split("  ")[0] for line in narrow.splitlines())
    for number in ("1,234,567", "0.1234567", "12"):
        assert number in narrow
    assert NAME in piped


def test_lines_into_a_pipe_are_whole_unless_a_width_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = "word " * 60 + "end"
    assert printed(words, width=None) == words + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, printed(words, width=None).splitlines())) <= 40


def test_lines_know_what_the_stream_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    say("Zürich \x1b[31m\nnext", err=True)
    assert raw.getvalue() == b"Z\\xfcrich \\x1b[31m\nnext\n"
