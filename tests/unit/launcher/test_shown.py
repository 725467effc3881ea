"""Commands with names that a terminal would obey, in plans, sweeps, data and run folders."""

import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from tar_files import write_tar

from engine.telemetry.console import PlainConsole, PlainTable
from launcher import cli
from omnivl.shown import printable

ROOT = Path(__file__).parents[3]
EVIL = "[/nope] [bold]x[/] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eback\r\x08 :smile:"
MODEL = ROOT / "configs" / "models" / "debug.yaml"


def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command prints; it ends well or with the message of a user's mistake."""
    monkeypatch.setattr(sys, "argv", ["omnivl", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code in (0, 2), out + err
    assert "Traceback" not in out + err
    assert_harmless(out + err)
    return out + err


def assert_harmless(text: str) -> None:
    hidden = {one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden <= set("\n\u200c\u200d"), sorted(map(hex, map(ord, hidden)))


def plan(folder: Path, **fields: object) -> str:
    stage = {"name": "a", "steps": 1, "data": [{"source": "emoji", "kind": "image_text"}], "objectives": ["univlc"]}
    tree = {"name": "p", "model": {"preset": str(MODEL)}, "launch": {"processes": 1}, "stages": [stage | fields]}
    tree |= {name: fields.pop(name) for name in ("name", "tokenizer") if name in tree and name in fields}
    (folder / "plan.yaml").write_text(json.dumps(tree))
    return str(folder / "plan.yaml")


@pytest.mark.parametrize(
    "fields",
    [
        {"name": EVIL},
        {"data": [{"source": EVIL, "kind": "image_text"}]},
        {"data": [{"source": "emoji", "kind": EVIL}]},
        {"objectives": [EVIL]},
        {"evaluate": {"tasks": [{"kind": "retrieval", "name": EVIL}]}},
        {EVIL: 1},
    ],
    ids=["stage", "source", "kind", "objective", "task", "field"],
)
def test_check_shows_names_of_a_plan_as_texts(
    fields: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(capfd, monkeypatch, "check", plan(tmp_path, **fields))
    assert "[/nope]" in text


def test_files_that_are_no_plans_are_told_of_as_texts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan.yaml").write_text(f"name: '{EVIL.replace(chr(27), '')}\nstages: ]")
    said(capfd, monkeypatch, "check", str(tmp_path / "plan.yaml"))
    said(capfd, monkeypatch, "check", str(tmp_path / f"{EVIL}.yaml".replace("/", "")))
    said(capfd, monkeypatch, "report", str(tmp_path / EVIL.replace("/", "")))


def test_inspect_and_convert_show_names_of_the_data_as_texts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    key = EVIL.replace("/", "").replace(".", "")
    shard = tmp_path / "x.tar"
    meta = {"caption": EVIL, "label": EVIL, "split": EVIL, "language": EVIL, EVIL: EVIL}
    members = {}
    for number in range(2):
        members |= {f"{key}{number}.png": picture.getvalue(), f"{key}{number}.json": json.dumps(meta).encode()}
        members |= {f"bad{key}{number}.png": b"no picture", f"bad{key}{number}.json": b"{" + EVIL.encode()}
    write_tar(shard, members)
    text = said(capfd, monkeypatch, "data", "inspect", str(shard), "--html", str(tmp_path / "sheet.html"))
    assert r"[/nope] [bold]x[/] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eback\r\x08 :smile:" in text
    assert_harmless((tmp_path / "sheet.html").read_text())
    labels = json.loads(said(capfd, monkeypatch, "data", "inspect", str(shard), "--json"))["labels"]
    assert labels == {EVIL: 2}
    pictures = tmp_path / "pictures" / key
    pictures.mkdir(parents=True)
    (pictures / f"{key}.png").write_bytes(picture.getvalue())
    (pictures / f"bad{key}.png").write_bytes(b"no picture")
    shards = str(tmp_path / f"shards {key}")
    said(capfd, monkeypatch, "data", "convert", "folder", str(tmp_path / "pictures"), "--out", shards)


def test_a_sweep_and_the_report_of_a_run_show_names_as_texts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {"name": EVIL, "plan": plan(tmp_path), "axes": {"seed": [1, 2], EVIL: [1]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    said(capfd, monkeypatch, "sweep", "run", str(tmp_path / "sweep.yaml"), "--dry-run")
    run = tmp_path / "run"
    (run / "stages" / "01-a").mkdir(parents=True)
    (run / "plan.yaml").write_text(json.dumps({"name": EVIL}))
    (run / "environment.json").write_text(json.dumps({"gpu": EVIL}))
    (run / "stages" / "01-a" / "evaluation.json").write_text(f'{{"{EVIL}')
    said(capfd, monkeypatch, "report", str(run))
    assert "stages/01-a/evaluation.json: got a file that cannot be read" in (run / "report.html").read_text()
    (run / "stages" / "01-a" / "evaluation.json").unlink()
    said(capfd, monkeypatch, "report", str(run))
    page = (run / "report.html").read_text()
    assert page.count("\\x1b[2J") >= 2
    assert "\x1b" not in page


ALPHABET = "[]/\\:<>&|*_`\"'#=\x1b\x07\x9b\r\n\t\x00\u2028\u202e\u2066\ufeff\ud83d\u00e9\u6771a1 "


def test_tables_and_lines_of_any_names_are_harmless_and_whole() -> None:
    draw = random.Random(7)
    for _ in range(300):
        names = ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 90))) for _ in range(4)]
        table = PlainTable(names[0], "two", title=names[1])
        table.add_row(names[2], names[3])
        narrow, wide = io.StringIO(), io.StringIO()
        for file, width in ((narrow, 80), (wide, None)):
            console = PlainConsole(file=file, width=width)
            console.print(names[0])
            console.print(table)
            assert_harmless(file.getvalue())
        assert all(printable(name).strip() in wide.getvalue() for name in names[2:])
        assert "\u2026" not in narrow.getvalue()
