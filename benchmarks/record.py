"""Results and environment of a benchmark, and their two files (JSON for scripts, Markdown for readers).

Results of a full run lie in ``benchmarks/results``, named after the benchmark and the type of device. Those of a quick
run, which only shows that the benchmark works, lie in ``runs/benchmarks``. A file is replaced as a whole and only when
its benchmark has completed, so that an interrupted run does not change the earlier result.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ratio
from engine.telemetry.environment import describe_environment, git_commit, usable_cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"
_VERSIONS = ("python", "torch", "deepspeed", "transformers", "numpy", "av", "pillow")


@dataclass(frozen=True)
class Options:
    """How a benchmark is to run.

    Attributes:
        device: Where the model computes.
        threads: Threads of torch on the CPU.
        quick: Whether to make a small run only, to show that everything works.
        out: Folder of the result files.
        own: What the benchmark's own options say.
    """

    device: torch.device
    threads: int
    quick: bool
    out: Path
    own: argparse.Namespace = field(default_factory=argparse.Namespace)


@dataclass(frozen=True)
class Table:
    """Rows of figures for a reader.

    Attributes:
        title: One line.
        columns: Head.
        rows: Cells, already as text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """The results of a benchmark.

    Attributes:
        benchmark: Its name.
        what: Description of the comparison, in a few sentences.
        ratios: The main results.
        tables: Further results.
        settings: Sizes and choices of this run, plain JSON values.
    """

    benchmark: str
    what: str
    ratios: Sequence[Ratio]
    tables: Sequence[Table] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works; figures are rough")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, help=f"folder of the result files (default {RESULTS.relative_to(ROOT)})")


def read_options(parsed: argparse.Namespace) -> Options:
    """Options from what ``add_options`` parsed."""
    name = parsed.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    out = parsed.out or (QUICK_RESULTS if parsed.quick else RESULTS)
    return Options(torch.device(name), parsed.threads, parsed.quick, out, parsed)


def main_of(
    benchmark: str,
    description: str | None,
    run: Callable[[Options], Report],
    add_own: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> Path:
    """The command line of one benchmark: ``python -m benchmarks.NAME``.

    Args:
        benchmark: Its name.
        description: For ``--help``.
        run: Makes the report.
        add_own: Adds options of its own.

    Returns:
        Path of the JSON file.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=description)
    add_options(parser)
    add_own(parser)
    options = read_options(parser.parse_args())
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load_before = os.getloadavg()[0]
    report = run(options)
    paths = write(report, options, sys.argv[1:], load_before)
    sys.stdout.write(ratio_lines(report) + f"\nwritten to {paths[0]} and {paths[1].name}\n")
    return paths[1]


def write(report: Report, options: Options, arguments: Sequence[str], load_before: float) -> tuple[Path, Path]:
    """Writes the two result files.

    Args:
        report: The results.
        options: How it ran.
        arguments: Command line after the module's name.
        load_before: Average number of busy processes in the minute before.

    Returns:
        Paths of the Markdown and the JSON file.
    """
    around = {
        "command": shlex.join(["python", "-m", f"benchmarks.{report.benchmark}", *arguments]),
        **_environment(options.device),
        "threads": options.threads,
        "quick": options.quick,
        "busy_processes_before": round(load_before, 2),
    }
    ratios = [{**dataclasses.asdict(ratio), "target": ratio.target, "met": ratio.met} for ratio in report.ratios]
    tables = [dataclasses.asdict(table) for table in report.tables]
    found = {
        "benchmark": report.benchmark,
        "what": report.what,
        **around,
        "settings": dict(report.settings),
        "ratios": ratios,
        "tables": tables,
    }
    values = values_path(report.benchmark, options)
    page = values.with_suffix(".md")
    replace_file(values, json.dumps(found, indent=1) + "\n")
    replace_file(page, markdown(report, around))
    return page, values


def values_path(benchmark: str, options: Options) -> Path:
    """The JSON file of a benchmark's results."""
    return options.out / f"{benchmark}-{options.device.type}.json"


def markdown(report: Report, around: Mapping[str, Any]) -> str:
    """The page for readers."""
    parts = [f"# {report.benchmark}", report.what]
    if around["quick"]:
        parts.append("**A quick run: it shows that the benchmark works; its figures are rough.**")
    rows = [[r.name, str(r.value), r.target, {None: "", True: "yes", False: "**no**"}[r.met]] for r in report.ratios]
    parts.append(markdown_table(["ratio", "median (range over the rounds)", "target", "met"], rows))
    parts += [f"## {table.title}\n\n{markdown_table(table.columns, table.rows)}" for table in report.tables]
    parts.append("## Measured on\n\n" + markdown_table(["", ""], [[k, _cell(v)] for k, v in around.items()]))
    if report.settings:
        parts.append("## Settings\n\n" + markdown_table(["", ""], [[k, _cell(v)] for k, v in report.settings.items()]))
    return "\n\n".join(parts) + "\n"


def ratio_lines(report: Report) -> str:
    """The ratios for a terminal, one per line."""
    marks = {None: "    ", True: "ok  ", False: "MISS"}
    width = max((len(ratio.name) for ratio in report.ratios), default=0)
    return "\n".join(
        f"{marks[ratio.met]} {report.benchmark}: {ratio.name:<{width}}  {ratio.value}  target: {ratio.target}"
        for ratio in report.ratios
    )


def _environment(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions: nothing that names the machine or its folders."""
    known = describe_environment(world_size=1)
    return {
        "date": known["started"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else known["cpu"],
        "cpu": known["cpu"],
        "memory_gib": known["memory_gib"],
        "cuda": known["cuda"],
        **{name: known[name] for name in _VERSIONS},
        "commit": _commit(known["git"]),
    }


def _commit(git: Mapping[str, Any] | None, digits: int | None = None) -> str | None:
    return None if git is None else git["commit"][:digits] + (" with changes" if git["changed"] else "")


def short_commit() -> str:
    """The commit that is run, for a cell of a table."""
    return _commit(git_commit(ROOT), 10) or "-"


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def replace_file(path: Path, text: str) -> None:
    """Writes a file beside and renames it: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_page(values: Path, page: Path, page_of: Callable[[Mapping[str, Any]], str]) -> None:
    """Writes a page from a result: ``page`` of a full run, else beside the result file.

    Args:
        values: From ``main_of``.
        page: Where it stands in the documentation.
        page_of: Its text from the content of the file.
    """
    place = page if values.parent == RESULTS else values.with_name(page.name)
    replace_file(place, page_of(json.loads(values.read_text("utf-8"))))
