"""``omnivl data``: build data sets, inspect and compare shards, convert other formats into shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from engine.telemetry.console import PlainConsole, PlainTable, titled
from launcher.commands.data_build import app as build_app
from launcher.commands.data_captions import captions
from launcher.commands.data_convert import app as convert_app
from launcher.commands.data_overlap import overlap
from launcher.commands.data_values import values
from omnivl.data.inspect import Inspection, inspect_source
from omnivl.data.inspect_page import bars_of, charts, readable_bytes, render_page
from omnivl.errors import DataError
from omnivl.shown import printable_json

app = typer.Typer(help="Build, inspect, compare and convert data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(build_app, name="build")
app.add_typer(convert_app, name="convert")
app.command("captions")(captions)
app.command("overlap")(overlap)
app.command("values")(values)

_CHART_ROWS = 6


@app.command("inspect")
def inspect(
    source: Annotated[str, typer.Argument(help="Shard, folder, glob or brace pattern; emoji; motion.")],
    html: Annotated[Path | None, typer.Option(help="Write a contact sheet to this file.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples on the contact sheet.")] = 48,
    scan: Annotated[int, typer.Option(min=0, help="Samples whose size and length are read.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Count the samples of a source by their properties and draw a contact sheet.

    Examples:
      omnivl data inspect emoji
      omnivl data inspect shards --html sheet.html
      omnivl data inspect shards --json
    """
    if html is not None and not html.parent.is_dir():
        raise DataError(f"--html {html}: the folder {html.parent} does not exist; make it or name another one")
    console = PlainConsole(stderr=as_json)
    with console.status(f"reading {source}"):
        found = inspect_source(source, samples=samples if html is not None else 0, scan=scan)
        page = None if html is None else render_page(found)
    if html is not None and page is not None:
        html.write_text(page, encoding="utf-8")
    if as_json:
        typer.echo(printable_json(found.to_json()))
    else:
        print_counts(console, found)
    if html is not None:
        console.print(f"contact sheet: {html}")
    refuse_what_is_no_shard(found)


def refuse_what_is_no_shard(found: Inspection) -> None:
    """Ends the command with an error if a file that was named is no shard.

    Raises:
        DataError: Naming the first such file, and why.
    """
    if found.no_shards:
        first = found.no_shards[0]
        count = f"{len(found.no_shards)} of {len(found.shards)} files are no shards; the first: "
        raise DataError(f"{found.source}: {count}{first.where}: {first.detail}")


def print_counts(console: PlainConsole, found: Inspection) -> None:
    """Prints an inspection as tables."""
    size = f", {readable_bytes(found.bytes)}" if found.shards else ""
    console.print(titled(f"{found.samples:,} samples", f" in {len(found.shards)} shards{size}: {found.source}"))
    if found.counted < found.samples:
        console.print(f"counts are of the {found.counted:,} samples that were drawn")
    if found.num_repeated_keys:
        console.print(
            f"{found.num_repeated_keys:,} keys are in more than one shard, e.g. {next(iter(found.repeated_keys))}"
        )
    if found.shards:
        shards = PlainTable("shard", "samples", "stills", "clips", "bad", "size")
        for shard in found.shards[:20]:
            counts = (shard.samples, shard.stills, shard.clips, shard.rejected)
            shards.add_row(shard.name, *(f"{count:,}" for count in counts), readable_bytes(shard.bytes))
        console.print(shards)
    if len(found.shards) > 20:
        console.print(f"and {len(found.shards) - 20} more shards")
    for chart in charts(found):
        shown = chart.bars[:_CHART_ROWS]
        line = ", ".join(f"{bar.name} {bar.count:,}" for bar in shown)
        more = f" and {len(chart.bars) - len(shown)} more" if len(chart.bars) > len(shown) else ""
        console.print(titled(chart.title, f": {line}{more}"))
    _print_rejected(console, found, found.rejected)


def _print_rejected(console: PlainConsole, found: Inspection, causes: Mapping[str, int]) -> None:
    if not causes:
        return
    bad = PlainTable("cause", "samples", "first one", title="Bad samples")
    for bar in bars_of(causes):
        first = next((entry for entry in found.rejections if entry.cause == bar.name), None)
        example = "" if first is None else f"{first.where}: {first.detail}"
        bad.add_row(bar.name.replace("_", " "), f"{bar.count:,}", example)
    console.print(bad)
