"""``omnivl data values``: the values of a field, as a list of answers or classes for a plan."""

from pathlib import Path
from typing import Annotated

import typer

from engine.telemetry.console import PlainConsole
from launcher.commands.outputs import require_writable
from omnivl.data.values import count_values, most_frequent
from omnivl.errors import DataError


def values(
    sources: Annotated[list[str], typer.Argument(help="Shards by a pattern, one or more; emoji.", show_default=False)],
    field: Annotated[str, typer.Option(help="Field of the samples' JSON; label is the class.")] = "answers",
    least: Annotated[int, typer.Option(min=1, help="Values that stand there less often are left out.")] = 1,
    most: Annotated[
        int | None, typer.Option(min=1, help="Keep so many, the most frequent.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The list: a value on each line.")] = Path("values.txt"),
) -> None:
    """Write the list of answers or classes that samples have, the most frequent first.

    Examples:
      omnivl data values emoji --field label --out labels.txt
      omnivl data values emoji emoji_hands --field group --least 100
    """
    require_writable(out)
    console = PlainConsole()
    with console.status(f"reading {', '.join(sources)}"):
        counts = count_values(sources, field)
    kept = most_frequent(counts, least, most)
    if not kept:
        raise DataError(
            f"--least: got {least}, and the most frequent value stands there {max(counts.values())} times; allowed is "
            "that number at most; lower it"
        )
    out.write_text("".join(f"{value}\n" for value in kept), encoding="utf-8")
    share = sum(counts[value] for value in kept) / counts.total()
    console.print(f"{len(kept):,} of {len(counts):,} values, {share:.1%} of all: {out}")
