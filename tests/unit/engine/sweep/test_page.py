"""The pages of a sweep."""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from engine.sweep.config import Sweep
from engine.sweep.figures import figures, side_by_side
from engine.sweep.page import write_sweep_markdown, write_sweep_page
from omnivl.errors import UserError

SWEEP = Sweep("s", Path("s.yaml"), Path("base.yaml"), {"ffn": {}, "size": {}}, (), 1, "ffn")
SIZES = (10_000, 20_000, 40_000, 80_000, 160_000)


@pytest.fixture
def rows() -> pd.DataFrame:
    complete = [
        {"run": f"{ffn}-{size}", "state": "complete", "why": "", "ffn": ffn, "size": size, "parameters": size}
        | {"flops": size * 1e6, "seconds": size / 1e3, "loss": 1 + offset + (size / 1e3) ** -0.5, "score/i2t R@1": 0.5}
        | {"processes": 1, "samples_per_second": 100.0, "batch": 8, "machine": "a CPU"}
        for offset, ffn in enumerate(("dense", "experts"))
        for size in SIZES
    ]
    failed = {"run": "lost", "state": "failed", "why": "exit code 2: a | b <b>\nc", "ffn": "dense", "size": 1}
    return pd.DataFrame([*complete, failed])


def test_figures_hold_the_runs_the_fits_and_the_front(rows: pd.DataFrame) -> None:
    drawn = figures(SWEEP, rows[rows["state"] == "complete"])
    assert {measure: len(row) for measure, row in drawn.items()} == {"loss": 3, "score/i2t R@1": 3}
    against_flops = drawn["loss"][1]
    assert [trace.name for trace in against_flops.data if trace.name] == [
        *("dense", "dense: front", "experts", "experts: front")
    ]
    whole = side_by_side(drawn["loss"])
    assert len(whole.data) == sum(len(figure.data) for figure in drawn["loss"])
    shown = [trace.name for trace in whole.data if trace.showlegend]
    assert shown == ["dense", "experts"]


def test_markdown_has_the_tables_and_a_picture_for_each_measure(
    rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, path: Path(path).write_text(figure.to_json()))
    text = write_sweep_markdown(SWEEP, rows, tmp_path).read_text()
    assert "10 complete, 1 failed.\nOn a CPU.\n" in text
    for picture in ("loss.svg", "i2t-R-1.svg"):
        assert f"({picture})" in text
        assert (tmp_path / picture).stat().st_size
    lines = text.splitlines()
    laws = lines.index("## Power laws of the loss")
    assert lines[laws + 1] == "| of | against | points | floor | scale | exponent |"
    assert lines[laws + 2] == "|---|---|---|---|---|---|"
    assert lines[laws + 3].startswith("| dense | parameters | 5 | 1 ± ")
    assert len([line for line in lines if line.startswith(("| dense-", "| experts-"))]) == 10
    assert r"exit code 2: a \| b \<b>\\nc |" in text
    assert lines.index("## At equal cost") > laws


def test_charts_are_large_enough_and_name_what_is_not_determined(rows: pd.DataFrame) -> None:
    rows.loc[rows["ffn"] == "experts", "loss"] = 3.0
    drawn = figures(SWEEP, rows[rows["state"] == "complete"])
    for figure in drawn["loss"]:
        assert figure.layout.height >= 480
        assert figure.layout.font.size >= 14
        assert figure.layout.title.text.endswith("<br><sub>fit not determined: experts</sub>")
    assert "not determined" not in drawn["score/i2t R@1"][0].layout.title.text
    whole = side_by_side(drawn["loss"])
    assert (whole.layout.width, whole.layout.height) == (2 * 620, 2 * 480), "three charts, two beside each other"
    assert whole.layout.font.size >= 14


def test_every_compared_curve_is_drawn(rows: pd.DataFrame) -> None:
    many = pd.concat([rows[rows["ffn"] == "dense"].assign(ffn=f"kind {number}") for number in range(11)])
    figure = figures(SWEEP, many[many["state"] == "complete"])["loss"][0]
    assert [trace.name for trace in figure.data if trace.name] == [f"kind {number}" for number in range(11)]


def test_names_of_runs_and_scores_are_texts_everywhere(
    rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(go.Figure, "write_image", lambda figure, path: Path(path).write_text("picture"))
    link = '<a href="http://evil.example">x</a>'
    evil = rows.assign(run=link, ffn=link).rename(columns={"score/i2t R@1": "score/../../up"})
    evil["score/../..-up"] = evil["score/../../up"]
    page, _ = write_sweep_page(SWEEP, evil, tmp_path / "out")
    written = page.read_text()
    assert '<a href="http://evil' not in written
    assert "\\u003ca href" not in written, "Plotly would read it as a link"
    text = write_sweep_markdown(SWEEP, evil, tmp_path / "out").read_text()
    assert "| \\<a href" in text
    assert sorted(path.name for path in (tmp_path / "out").glob("*.svg")) == ["loss.svg", "up-2.svg", "up.svg"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_html_shows_what_was_said_and_does_not_obey_it(rows: pd.DataFrame, tmp_path: Path) -> None:
    page, table = write_sweep_page(SWEEP, rows, tmp_path)
    assert "a | b &lt;b&gt;" in page.read_text()
    assert len(pd.read_parquet(table)) == 11


def test_without_what_draws_pictures_the_remedy_is_said(
    rows: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(figure: go.Figure, path: Path) -> None:
        raise ValueError("Image export requires the kaleido package")

    monkeypatch.setattr(go.Figure, "write_image", fail)
    with pytest.raises(UserError, match=r"requires the kaleido package.*pip install 'omnivl\[pictures\]'"):
        write_sweep_markdown(SWEEP, rows, tmp_path)
    assert not (tmp_path / "sweep.md").exists()


def test_pages_of_a_sweep_of_which_nothing_is_done_yet(tmp_path: Path) -> None:
    rows = pd.DataFrame([{"run": "a", "state": "missing", "why": "", "ffn": "dense", "size": 1}])
    page, _ = write_sweep_page(SWEEP, rows, tmp_path)
    assert "1 missing" in page.read_text()
    assert "| a | missing |" in write_sweep_markdown(SWEEP, rows, tmp_path).read_text()
