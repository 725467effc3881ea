import io
import math

import pytest
from rich.console import Console

from engine.telemetry.progress import LiveProgress, SilentProgress, SmoothedLosses, duration, make_progress


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def output(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def test_plain_lines_every_n_steps() -> None:
    shown = console(terminal=False)
    with make_progress({"one": 5, "two": 10}, every=2, visible=True, console=shown) as progress:
        progress.begin_stage(0, "one", 5, 0)
        for step in range(1, 6):
            progress.update(step, {"mlm": 2.0}, 12.34)
        progress.begin_stage(1, "two", 10, 3)
    lines = output(shown).splitlines()
    assert lines[0] == "stage 1/2 one: 5 steps"
    assert [line.split("  ")[1] for line in lines[1:4]] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "mlm 2.000  12.3 samples/s  0 s left in stage" in lines[3]
    assert lines[4] == "stage 2/2 two: 10 steps, going on after step 3"


def test_live_panel_on_a_terminal() -> None:
    shown = console(terminal=True)
    with make_progress({"one": 4}, every=2, visible=True, console=shown) as progress:
        assert isinstance(progress, LiveProgress)
        progress.begin_stage(0, "one", 4, 0)
        progress.update(1, {"mlm": 2.0, "vlm": 0.5}, 10.0)
        progress.message("a line of its own")
    for text in ("stage 1/1 one", "step 1/4", "mlm 2.000  vlm 0.500", "10.0 samples/s", "a line of its own"):
        assert text in output(shown)


def test_other_replicas_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress({"one": 4}, every=1, visible=False) as progress:
        assert isinstance(progress, SilentProgress)
        progress.begin_stage(0, "one", 4, 0)
        progress.update(1, {"mlm": 2.0}, 10.0)
        progress.message("nothing")
    assert capsys.readouterr().out == ""


def test_smoothing_has_no_bias_at_the_start() -> None:
    smoothed = SmoothedLosses(smoothing=0.5)
    smoothed.add({"mlm": 4.0})
    assert smoothed.means == {"mlm": 4.0}
    smoothed.add({"mlm": 1.0, "vlm": math.nan})
    # (0.5 * 0.5 * 4 + 0.5 * 1) / (0.5 * 0.5 + 0.5) = 1.5 / 0.75
    assert smoothed.means == {"mlm": 2.0}


def test_durations() -> None:
    assert [duration(seconds) for seconds in (None, 7.4, 200, 3725)] == ["?", "7 s", "3 min 20 s", "1 h 02 min"]
