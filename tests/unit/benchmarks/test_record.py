"""Result files: their content, and that a failure does not change earlier ones."""

import argparse
import json
import socket
import sys
from pathlib import Path

import patience
import pytest
import torch

from benchmarks import record
from benchmarks.__main__ import BENCHMARKS
from benchmarks.measure import Ratio, Spread
from benchmarks.record import QUICK_RESULTS, RESULTS, ROOT, Options, Report, Table, add_options, read_options, write

REPORT = Report(
    "towers",
    "Ours against theirs.",
    [
        Ratio("ours / theirs", Spread.of([1.5, 1.0, 2.0]), at_least=1.4),
        Ratio("b | c", Spread.of([1.1]), at_most=1.03),
        Ratio("d", Spread.of([0.5])),
    ],
    [Table("Speed", ("what", "per second"), [("ours", "100")])],
    {"pairs": 64},
)


def options_in(folder: Path, quick: bool = False) -> Options:
    return Options(torch.device("cpu"), threads=2, quick=quick, out=folder)


def test_both_files_say_what_was_found_and_on_what(tmp_path):
    page, values = write(REPORT, options_in(tmp_path), ["--threads", "2"], load_before=0.126)
    assert (page.name, values.name) == ("towers-cpu.md", "towers-cpu.json")
    found = json.loads(values.read_text())
    assert found["command"] == "python -m benchmarks.towers --threads 2"
    assert [ratio["met"] for ratio in found["ratios"]] == [True, False, None]
    assert found["ratios"][0]["value"] == {"median": 1.5, "least": 1.0, "most": 2.0, "rounds": 3}
    assert found["torch"] == torch.__version__
    assert found["busy_processes_before"] == 0.13
    assert found["settings"] == {"pairs": 64}
    assert {"date", "device", "cpu", "memory_gib", "python", "commit"} <= found.keys()
    lines = page.read_text().splitlines()
    assert "| ours / theirs | 1.50 (1.00 to 2.00) | at least 1.4 | yes |" in lines
    assert "| b \\| c | 1.10 (1.10 to 1.10) | at most 1.03 | **no** |" in lines
    assert "| ours | 100 |" in lines
    assert not any("quick run" in line for line in lines)
    for text in (page.read_text(), values.read_text()):
        assert socket.gethostname() not in text
        assert str(ROOT) not in text


def test_a_quick_result_says_so(tmp_path):
    page, values = write(REPORT, options_in(tmp_path, quick=True), [], load_before=0.0)
    assert json.loads(values.read_text())["quick"] is True
    assert "A quick run" in page.read_text()


def test_a_failing_write_leaves_the_earlier_result(tmp_path, monkeypatch):
    values = write(REPORT, options_in(tmp_path), [], load_before=0.0)[1]
    before = values.read_text()

    def fail(path: Path, text: str, encoding: str) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(record.Path, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        write(REPORT, options_in(tmp_path, quick=True), [], load_before=0.0)
    assert values.read_text() == before


def test_quick_results_go_elsewhere():
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert read_options(parser.parse_args([])).out == RESULTS
    assert read_options(parser.parse_args(["--quick"])).out == QUICK_RESULTS
    assert read_options(parser.parse_args(["--quick", "--out", "x", "--device", "cpu"])).out == Path("x")


def test_every_benchmark_of_the_table_has_a_command_line():
    for name in BENCHMARKS:
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert f'main_of("{name}", ' in source


def test_an_unknown_benchmark_is_refused():
    done = patience.run(
        [sys.executable, "-m", "benchmarks", "loader", "tower"], cwd=ROOT, capture_output=True, text=True, limit=120
    )
    assert done.returncode == 2
    assert f"no benchmark tower; known: {', '.join(BENCHMARKS)}" in done.stderr
