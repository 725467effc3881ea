"""``omnivl routing``: which expert took which token, as a page and as a table."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from engine.disk.trained import Trained, find_trained, load_encoder
from engine.processes.process_group import choose_device
from engine.telemetry.console import PlainConsole, PlainTable, say
from launcher.commands.embed import parse_media, parse_where
from launcher.commands.outputs import require_writable
from moe.analysis import stability, usage
from omnivl.architectures import Architecture
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError
from omnivl.inference.pictures import Media, PictureSet
from omnivl.tasks.routing.forced import forced_by, idle
from omnivl.tasks.routing.page import routing_page, write_table
from omnivl.tasks.routing.tokens import experts_by_layer, joined, routed_tokens


def routing(
    target: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    data: Annotated[str, typer.Option(help="emoji, motion, or shards by a pattern.")] = "emoji",
    media: Annotated[str, typer.Option(help="image, video, or all that model and data have, on one page.")] = "all",
    where: Annotated[str, typer.Option(help="Filter by metadata, e.g. '{style: [twemoji]}'.")] = "{}",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for page and table; the run's by default.", show_default=False),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another routing.parquet of the same data: how stable?", show_default=False)
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Upper bound; evenly thinned beyond it.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Writes where a trained model's routers send patches and words: routing.html and routing.parquet.

    Examples:
      omnivl routing runs/quickstart
      omnivl routing runs/quickstart --media video --out routing
      omnivl routing runs/quickstart --json
    """
    seen = None if media == "all" else parse_media(media)
    chosen = parse_where(where)
    trained = find_trained(target, stage, plan)
    folder = out or _folder(trained, target)
    require_writable(folder / "routing.html")
    with torch.no_grad():
        encoder = load_encoder(trained, choose_device(), batch_size)
        open_set = partial(
            PictureSet, data, where=chosen, sizes=encoder.model.inputs, max_samples=max_samples, reads="media"
        )
        sets = _all_sets(encoder.model, open_set) if seen is None else [open_set(seen)]
        tables = [routed_tokens(encoder, pictures) for pictures in sets]
    tokens = tables[0] if len(tables) == 1 else joined(tables)
    num_experts = experts_by_layer(encoder.model, tokens)
    write_table(tokens, folder / "routing.parquet")
    title = f"Routing of {trained.plan.name}, stage {trained.stage.name}"
    forced = forced_by(encoder.model, tokens)
    page = routing_page(tokens, num_experts, sets, encoder.model.inputs.patch_size, title, forced)
    (folder / "routing.html").write_text(page, encoding="utf-8")
    since = None if against is None else stability(pd.read_parquet(against), tokens)
    if as_json:
        said = {"plan": trained.plan.name, "stage": trained.stage.name, "step": trained.step, "data": data}
        counts = {"pictures" if one.media == "image" else "clips": len(one) for one in sets}
        files = {"page": str(folder / "routing.html"), "table": str(folder / "routing.parquet")}
        found_tables = {
            "usage": _records(usage(tokens, num_experts)),
            "stability": None if since is None else _records(since),
        }
        typer.echo(json.dumps({**files, **said, **counts, **found_tables}, indent=2))
        return
    console = PlainConsole()
    said_by_experts_used = ["global_entropy", "evenness"]  # left out, since 80 columns have no room for them
    found = usage(tokens, num_experts).drop(columns=said_by_experts_used)
    console.print(_table(found, title))
    for sentence in idle(tokens, num_experts, forced):
        console.print(sentence)
    if since is not None:
        console.print(_table(since, f"Since {against}"))
    say(f"{folder / 'routing.html'}\n{folder / 'routing.parquet'}")


def _folder(trained: Trained, target: Path) -> Path:
    return trained.run.path if trained.run is not None else target.parent


def _all_sets(model: Architecture, open_set: Callable[[Media], PictureSet]) -> list[PictureSet]:
    """Pictures and clips, as far as the model takes and the source has them.

    Raises:
        DataError: It has neither, or one of its samples is bad.
    """
    known: tuple[tuple[Media, str], ...] = (("image", "image"), ("video", "clip"))
    sets, lacking = [], []
    for one in (media for media, name in known if name in model.shows):
        try:
            sets.append(open_set(one))
        except DataError as error:
            if isinstance(error.__cause__, BadSampleError):
                raise
            lacking.append(error)
    if not sets:
        raise lacking[0]
    return sets


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain containers; what is no number is null."""
    read: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return read


def _table(frame: pd.DataFrame, title: str) -> PlainTable:
    headings = [name.replace("_", "\n") for name in frame.columns]
    table = PlainTable(*headings, title=title, padding=(0, 1, 0, 0))
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value) for value in row))
    return table
