"""``omnivl data build``: data sets from their originals."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from engine.telemetry.console import PlainConsole, PlainTable
from omnivl.data.emoji.packages import Progress as Told
from omnivl.data.icons.sets import GROUPS, Group
from omnivl.data.inspect_page import readable_bytes
from omnivl.errors import DataError
from omnivl.shown import printable, printable_json

app = typer.Typer(help="Build data sets from their originals.", no_args_is_help=True, rich_markup_mode=None)


@app.command("emoji")
def build_emoji_command(
    out: Annotated[Path, typer.Option(help="Folder for the shards, the vocabulary and the manifest.")],
    packages: Annotated[Path | None, typer.Option(help="Folder with the npm archives; else they are fetched.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All drawings at 256 px, all clips, 28 languages.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Build the emoji set from its npm packages, byte for byte the same each time.

    Examples:
      omnivl data build emoji --out emoji --full
    """
    from omnivl.data.emoji.build import build_emoji  # here: it needs the extra 'data', the other commands do not

    with _bars() as update:
        report = build_emoji(out, packages=packages, full=full, progress=update)
    counts: dict[str, object] = {
        "concepts": report.concepts,
        "clips": report.clips,
        "drawings": dict(report.drawings),
        "splits": dict(report.splits),
        "vocabulary": report.vocabulary,
        "shards": len(report.shards),
    }
    if as_json:
        typer.echo(json.dumps(counts, indent=1))
        return
    _print_counts(out, counts)


@app.command("icons")
def build_icons_command(
    out: Annotated[Path, typer.Option(help="Folder for the shards, the notice of licences and the manifest.")],
    packages: Annotated[
        Path | None, typer.Option(help="The archive of @iconify/json, or the folder that has it; else it is fetched.")
    ] = None,
    licences: Annotated[
        list[str] | None,
        typer.Option(help=f"Use these as well as free ones: {', '.join(GROUPS[1:])}; can be repeated."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--set", help="Use only this set; can be repeated.")] = None,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side of the pictures in pixels.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Of the colours of monochrome icons.")] = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Number of processes; else one per core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Build shards of icons and their names, of 207 free sets in one npm package, the same bytes each time.

    Examples:
      omnivl data build icons --out data/icons
      omnivl data build icons --out data/emoji-hands --set noto --set twemoji
      omnivl data build icons --out data/all-icons --licences share-alike --licences non-free
    """
    from omnivl.data.icons.build import IconOptions, build_icons  # here: it needs the extra 'data'

    options = IconOptions(groups=_groups(licences or ()), sets=tuple(only or ()), size=size, seed=seed)
    with _bars() as update:
        report = build_icons(out, packages, options, processes=processes, progress=update)
    if as_json:
        typer.echo(printable_json(json.dumps(asdict(report) | {"out": str(out)}, indent=1)))
        return
    _print_counts(
        out,
        {
            "icons": report.icons,
            "sets": len(report.counts["set"]),
            "sets left out": len(report.left_out),
            "hand": report.counts["hand"],
            "split": report.counts["split"],
            "licences": report.counts["license"],
            "not drawn": report.refused or 0,
            "shards": report.shards,
            "size": readable_bytes(report.bytes),
            "CPU seconds": round(report.cpu_seconds),
        },
    )


def _groups(asked: Iterable[str]) -> tuple[Group, ...]:
    """Groups of licences: the free ones and those that are asked for.

    Raises:
        DataError: There is no such group.
    """
    groups: list[Group] = [GROUPS[0]]
    for name in asked:
        group = next((one for one in GROUPS if one == name), None)
        if group is None:
            raise DataError(f"--licences {name}: allowed: {', '.join(GROUPS)}")
        groups += [group] if group not in groups else []
    return tuple(groups)


@contextmanager
def _bars() -> Iterator[Told]:
    """Shows a bar for each activity that a build tells of."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        console=PlainConsole(stderr=True),
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what))
            bars.update(tasks[what], completed=done, total=total)

        yield update


def _print_counts(out: Path, counts: Mapping[str, object]) -> None:
    table = PlainTable("what", "count", title=str(out))
    for name, value in counts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {count:,}" for key, count in value.items())
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    PlainConsole().print(table)
