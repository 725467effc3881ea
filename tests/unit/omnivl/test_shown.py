"""Texts of data, plans and foreign files as people see them: whole, and harmless."""

import json
from pathlib import Path

import pytest

from omnivl.pages import page_template
from omnivl.shown import chart_text, data_picture, file_name, file_names, markdown_text, printable, printable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a cat", "a cat"),
        ("[/nope] <b> & :smile:", "[/nope] <b> & :smile:"),
        ("red \x1b[31m and \x9b31m", r"red \x1b[31m and \x9b31m"),
        ("title \x1b]0;x\x07", r"title \x1b]0;x\x07"),
        ("two\nlines\r and\ta tab", r"two\nlines\r and\ta tab"),
        ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
        ("\u202egnp.exe \u2066x\u2069 \ufeff", r"\u202egnp.exe \u2066x\u2069 \ufeff"),
        ("half \ud83d a pair", r"half \ud83d a pair"),
        ("\x00\x7f", r"\x00\x7f"),
        ("tag \U000e0041", r"tag \U000e0041"),
        ("Z\u00fcrich \u6771\u4eac\u3000\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 a\u00a0b", None),
        ("\U0001f469\u200d\U0001f680", None),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_written_out(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)
    printable(text).encode()


def test_every_character_is_shown_or_written_out() -> None:
    for number in range(0x110000):
        shown = printable(chr(number))
        assert shown == chr(number) or (shown.isascii() and shown.startswith("\\")), hex(number)
        if number < 32 or 0x7F <= number < 0xA0 or 0xD800 <= number < 0xE000:
            assert shown != chr(number)


def test_json_keeps_its_value() -> None:
    value = {"\x1b": "\x9b\u202e\u2028 \ud83d \u00e9", "a": [1, "\n"]}
    written = printable_json(json.dumps(value, indent=1, ensure_ascii=False))
    assert json.loads(written) == value
    assert printable(written, keep="\n") == written


def test_newlines_of_our_own_messages_may_stay() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable(Path("a/b")) == "a/b"


def test_charts_and_markdown_read_no_tags_in_it() -> None:
    assert chart_text('<a href="http://x">y</a>\x1b') == '&lt;a href="http://x"&gt;y&lt;/a&gt;\\x1b'
    assert markdown_text("a|b [x](y) `z` <i>\n") == r"a\|b \[x\](y) \`z\` \<i>\\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("image->text R@1", "image-text-R-1"),
        ("../../etc/passwd", "etc-passwd"),
        ("/", "x"),
        ("..", "x"),
        (".hidden", "hidden"),
        ("a\nb\x00c", "a-b-c"),
        ("a%2fb", "a-2fb"),
        ("é" * 300, "x"),
        ("a" * 300, "a" * 120),
        ("lr+1.5_x", "lr+1.5_x"),
    ],
)
def test_names_of_files_stay_in_their_folder(text: str, name: str) -> None:
    assert file_name(text) == name
    assert Path("folder", file_name(text)).parent == Path("folder")


def test_two_texts_never_share_a_file() -> None:
    assert file_names(["a/b", "a-b", "A B", "c", "a/b"]) == {"a/b": "a-b", "a-b": "a-b-2", "A B": "A-B-3", "c": "c"}
    assert file_names(["a", "a-2", "a?", "A"]) == {"a": "a", "a-2": "a-2", "a?": "a-3", "A": "A-4"}


def test_pictures_of_pages_hold_their_pixels() -> None:
    inside = "data:image/png;base64,AAAA+/=="
    assert data_picture(inside) == inside
    for other in (
        "http://x/y.png",
        "javascript:alert(1)",
        "data:image/svg+xml;base64,AA",
        f'{inside}" onload="x',
        7,
        None,
    ):
        assert data_picture(other) == ""


def test_templates_escape_every_text_and_no_number(tmp_path: Path) -> None:
    (tmp_path / "p.html.j2").write_text('<p title="{{ a }}">{{ a }}</p>{{ 3 }}{{ b | picture }}')
    shown = page_template(tmp_path, "p.html.j2").render(a='"<script>\x1b\u202e', b="http://x")
    assert shown == '<p title="&#34;&lt;script&gt;\\x1b\\u202e">&#34;&lt;script&gt;\\x1b\\u202e</p>3'


def test_joined_texts_are_escaped_too(tmp_path: Path) -> None:
    (tmp_path / "p.html.j2").write_text("{{ words | join(', ') }}{{ one | replace('_', ' ') }}")
    shown = page_template(tmp_path, "p.html.j2").render(words=["<b>", "\x1b", "\u202e"], one="a_\x9b<i>")
    assert shown == "&lt;b&gt;, \\x1b, \\u202ea \\x9b&lt;i&gt;"
