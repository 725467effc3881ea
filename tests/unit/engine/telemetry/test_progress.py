import contextlib
import io
import math
import re

import pytest
from rich.console import Console

from engine.telemetry.curve import CurvePoint
from engine.telemetry.pace import SmoothedLosses, duration
from engine.telemetry.progress import LiveProgress, SilentProgress, make_progress


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


def test_learning_rates_are_shown() -> None:
    shown, live = console(terminal=False), console(terminal=True)
    for one in (shown, live):
        with make_progress({"one": 4}, every=1, visible=True, console=one) as progress:
            progress.begin_stage(0, "one", 4, 0)
            progress.update(1, {"mlm": 2.0}, 10.0, {"decay": 2e-4, "no_decay": 2e-4})
            progress.update(2, {"mlm": 2.0}, 10.0, {"decay": 1e-4, "decay_x0.5": 5e-5})
    assert [line.split("  ")[3] for line in output(shown).splitlines()[1:]] == [
        "lr 2.00e-04",
        "lr 5.00e-05 to 1.00e-04",
    ]
    assert "lr 5.00e-05 to 1.00e-04" in output(live)


def screen(written: str) -> list[str]:
    """What a terminal shows in the end, of output that moves up and clears lines."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\x1b\[\?25[hl]|[\r\n])", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part and part != "\r" and not part.startswith("\x1b"):
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_the_panel_of_every_stage_stays_on_the_screen() -> None:
    live = console(terminal=True)
    with make_progress({"one": 4, "two": 6}, every=2, visible=True, console=live) as progress:
        for index, (name, steps) in enumerate({"one": 4, "two": 6}.items()):
            progress.begin_stage(index, name, steps, 0)
            for step in range(1, steps + 1):
                progress.update(step, {"mlm": float(step)}, 10.0, {"decay": 1e-3})
        progress.message("report: runs/x")
    left = screen(output(live))
    for text in ("step 4/4", "step 6/6", "report: runs/x"):
        assert sum(text in line for line in left) == 1, left
    assert sum("lr 1.00e-03" in line for line in left) == 2
    assert left.index("report: runs/x") < next(row for row, line in enumerate(left) if "step 6/6" in line)


def test_a_run_that_fails_before_its_first_stage_leaves_no_panel() -> None:
    live = console(terminal=True)
    with contextlib.suppress(ValueError), make_progress({"one": 4}, every=2, visible=True, console=live):
        raise ValueError("no data")
    assert not any(screen(output(live)))


@pytest.mark.parametrize("terminal", [False, True])
def test_names_of_stages_and_objectives_are_texts(terminal: bool) -> None:
    shown = console(terminal=terminal)
    name = "[/nope]\x1b[2J"
    with make_progress({name: 1}, every=1, visible=True, console=shown) as progress:
        progress.begin_stage(0, name, 1, 0)
        progress.update(1, {"[red]": 2.0}, 10.0)
        progress.message("[/bold] \x1b]0;title\x07")
    assert "\x1b[2J" not in output(shown)
    assert "\x1b]0" not in output(shown)
    for text in (r"[/nope]\x1b[2J", "[red] 2.000", r"[/bold] \x1b]0;title\x07"):
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


def points() -> list[CurvePoint]:
    name = "unseen/image->text R@1"
    return [
        CurvePoint(step=step, seconds=60.0, cost=1.0, scores={name: score}, chance={name: 0.01}, queries={name: 141})
        for step, score in ((0, 0.01), (2, 0.05))
    ]


def test_the_newest_point_of_the_curve_is_a_line_or_a_row_of_the_panel() -> None:
    plain, live = console(terminal=False), console(terminal=True)
    for one in (plain, live):
        with make_progress({"one": 4, "two": 4}, every=9, visible=True, console=one) as progress:
            progress.begin_stage(0, "one", 4, 0)
            progress.update(1, {"mlm": 2.0}, 10.0)
            progress.curve(points()[:1], None)
            progress.curve(points(), 0.0166)
            progress.begin_stage(1, "two", 4, 0)
    said = "unseen/image->text R@1 0.050, 5.0 x chance (141 queries)  ▂█  1.7 % of the time"
    assert output(plain).splitlines()[1:3] == [
        "stage 1/2 one  step 0/4  unseen/image->text R@1 0.010, 1.0 x chance (141 queries)",
        f"stage 1/2 one  step 2/4  {said}",
    ]
    left = screen(output(live))
    assert sum(said in line for line in left) == 1, "it stays with its stage, and the next one begins without"
    assert next(line for line in left if said in line).split()[0] == "curve"


def test_a_console_of_ascii_gets_no_bars() -> None:
    ascii_only = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=200, color_system=None)
    with make_progress({"one": 4}, every=9, visible=True, console=ascii_only) as progress:
        progress.begin_stage(0, "one", 4, 0)
        progress.curve(points(), 0.0166)
    ascii_only.file.flush()
    written = ascii_only.file.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "5.0 x chance (141 queries)  1.7 % of the time" in written
