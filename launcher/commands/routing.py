"""``omnivl routing``: which expert took which token, as a page and as a table."""

import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from engine.finished.trained import Trained, find_trained, load_encoder
from engine.processes.process_group import choose_device
from launcher.commands.embed import parse_media, parse_where
from moe.analysis import stability, usage
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.routing.page import routing_page, write_table
from omnivl.tasks.routing.tokens import experts_by_layer, routed_tokens


def routing(
    target: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    data: Annotated[str, typer.Option(help="emoji, motion, or shards by a pattern.")] = "emoji",
    media: Annotated[str, typer.Option(help="image or video.")] = "image",
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
      omnivl routing runs/quickstart --out routing
      omnivl routing runs/quickstart --json
    """
    seen, chosen = parse_media(media), parse_where(where)
    trained = find_trained(target, stage, plan)
    folder = out or _folder(trained, target)
    with torch.no_grad():
        encoder = load_encoder(trained, choose_device(), batch_size)
        pictures = PictureSet(data, seen, chosen, encoder.model.inputs, max_samples, "media")
        tokens = routed_tokens(encoder, pictures)
    num_experts = experts_by_layer(encoder.model, tokens)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(tokens, folder / "routing.parquet")
    title = f"Routing of {trained.plan.name}, stage {trained.stage.name}"
    page = routing_page(tokens, num_experts, pictures, encoder.model.inputs.patch_size, title)
    (folder / "routing.html").write_text(page, encoding="utf-8")
    since = None if against is None else stability(pd.read_parquet(against), tokens)
    if as_json:
        said = {"plan": trained.plan.name, "stage": trained.stage.name, "step": trained.step, "data": data}
        files = {"page": str(folder / "routing.html"), "table": str(folder / "routing.parquet")}
        tables = {
            "usage": _records(usage(tokens, num_experts)),
            "stability": None if since is None else _records(since),
        }
        typer.echo(json.dumps({**files, **said, "pictures": len(pictures), **tables}, indent=2))
        return
    console = Console(emoji=False)
    said_by_experts_used = ["global_entropy", "evenness"]  # left out, since 80 columns have no room for them
    found = usage(tokens, num_experts).drop(columns=said_by_experts_used)
    console.print(_table(found, title))
    if since is not None:
        console.print(_table(since, f"Since {against}"))
    typer.echo(f"{folder / 'routing.html'}\n{folder / 'routing.parquet'}")


def _folder(trained: Trained, target: Path) -> Path:
    return trained.run.path if trained.run is not None else target.parent


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain containers; what is no number is null."""
    read: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return read


def _table(frame: pd.DataFrame, title: str) -> Table:
    headings = [name.replace("_", "\n") for name in frame.columns]
    table = Table(
        *headings, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    return table
