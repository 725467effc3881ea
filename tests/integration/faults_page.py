"""Writes docs/faults.md from a run of the tests that break runs.

python -m pytest --full tests/integration/test_faults.py tests/integration/test_rollback.py --junitxml faults.xml
python tests/integration/faults_page.py faults.xml

If a test is in several reports, the last one counts. Without a report only the section "Inputs" is written anew, from
``inputs.json`` beside this file. Figures there are of runs by hand: whoever repeats one changes its row.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
LAYOUTS = {"plain": "plain", "zero3": "ZeRO-3", "pipeline": "2 pipeline stages"}
HEAD = """# Faults

Which faults a run survives. In each case a fault is injected into a run on two processes (one for losses on the plain
host) from outside (`tests/integration/faults/sitecustomize.py`), at one moment, on its first or its last rank. The run
survives it if the other processes end by themselves, the message names the rank and the fault, no process is left, and
the same command then ends with exactly the bits (weights, twins, moments, queue, generators, position in the data,
lines of metrics) of a run without the fault. Background: [`design/NOTE`](design/NOTE).

Written by `tests/integration/faults_page.py` from {reports} of `tests/integration/test_faults.py` and
`test_rollback.py`: **{survived} of {tried} faults survived**, on two CPU cores; `-` was not tested.
{repeated}Seconds are the longest from the fault to the end of the last process, on a machine that may be busy with
other things; where a rank hangs they include the limit of 4 s (`guard.hang_seconds`).

| fault | LAYOUTS |
|---|RULES
"""
NOTE = "0010-faults.md"
INPUTS = Path(__file__).with_name("inputs.json")
INPUTS_TITLE = "## Inputs"
INPUTS_HEAD = """
Damaged, mutated and hostile inputs, made at random from fixed seeds ({date}). One of two has to happen: what is read is
what was written, or one error names the file, line or field and says what to do. *Mended* are the findings of something
else: a traceback, a hang, memory without bound, a wrong value taken without a word (`-`: not counted). *Left* are those
at which that still happens. A part of each runs with `make test`, more with `make test-full`.

| input | tried | mended | left | seconds | kept out by | tests |
|---|---|---|---|---|---|---|
"""


def page(reports: Sequence[Path]) -> str:
    """The page as Markdown."""
    found: dict[str, dict[str, list[tuple[bool, float | None]]]] = defaultdict(lambda: defaultdict(list))
    runs = [one for report in reports for one in ElementTree.parse(report).iter("testcase") if one.get("name")]
    cases = {one.attrib["name"]: one for one in runs}
    for case in cases.values():
        facts = {one.attrib["name"]: one.attrib["value"] for one in case.iterfind("properties/property")}
        if "fault" in facts:
            layout, _, fault = facts["fault"].partition(", ")
            found[fault][layout].append((passed(case), float(facts["seconds"]) if "seconds" in facts else None))
    earlier = [one for one in runs if cases[one.attrib["name"]] is not one]
    failed = sum(not passed(one) for one in earlier)
    repeated = f"{len(earlier)} tests were run again, {failed} of them after a failure; the last run counts.\n"
    outcomes = [outcome for row in found.values() for cell in row.values() for outcome in cell]
    head = HEAD.replace("LAYOUTS", " | ".join(LAYOUTS.values())).replace("RULES", "---|" * len(LAYOUTS))
    head = head.replace("NOTE", NOTE).format(
        survived=sum(good for good, _ in outcomes),
        tried=len(outcomes),
        reports="a run" if len(reports) == 1 else f"{len(reports)} runs of parts",
        repeated=repeated if earlier else "",
    )
    rows = [
        f"| {fault} | {' | '.join(cell(row[layout]) for layout in LAYOUTS)} |" for fault, row in sorted(found.items())
    ]
    return head + "\n".join(rows) + "\n"


def inputs_section(file: Path = INPUTS) -> str:
    """The section on damaged and hostile inputs."""
    content = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        f"| {row['input']} | {row['tried']:,} | {_shown(row['mended'])} | {row['left']} | {_shown(row['seconds'])} "
        f"| {row['kept_out_by']} | `{row['again']}` |"
        for row in content["rows"]
    ]
    total = f"| all | {sum(row['tried'] for row in content['rows']):,} | " + " | ".join(
        str(sum(row[name] or 0 for row in content["rows"])) for name in ("mended", "left")
    )
    return INPUTS_TITLE + "\n" + INPUTS_HEAD.format(**content) + "\n".join([*lines, f"{total} | | | |"]) + "\n"


def _shown(figure: int | None) -> str:
    return "-" if figure is None else str(figure)


def passed(case: ElementTree.Element) -> bool:
    """Whether a test has run and found nothing wrong."""
    return all(case.find(what) is None for what in ("failure", "error", "skipped"))


def cell(outcomes: list[tuple[bool, float | None]]) -> str:
    """``2 of 2, 0.4 s``; ``-`` where nothing was tried."""
    if not outcomes:
        return "-"
    seconds = [duration for _, duration in outcomes if duration is not None]
    return f"{sum(good for good, _ in outcomes)} of {len(outcomes)}" + (f", {max(seconds):.1f} s" if seconds else "")


if __name__ == "__main__":
    reports = [Path(report) for report in sys.argv[1:]]
    faults = page(reports) if reports else PAGE.read_text(encoding="utf-8").partition(INPUTS_TITLE)[0]
    PAGE.write_text(f"{faults.rstrip()}\n\n{inputs_section()}", encoding="utf-8")
