"""``omnivl serve``: a page on which a trained run is tried out, on this machine and without a network."""

from pathlib import Path
from typing import Annotated

import typer

import omnivl
from engine.telemetry.console import PlainConsole, say
from launcher.commands.embed import parse_where
from launcher.serve.answers import About, Answers
from launcher.serve.gallery import open_gallery
from launcher.serve.index import Index, open_index, weights_hash
from launcher.serve.rules import is_loopback
from launcher.serve.server import PageServer
from omnivl.errors import DataError, UserError
from omnivl.inference.pictures import Media

_TAKES: dict[str, Media] = {"image": "image", "clip": "video"}


def serve(
    run: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="emoji, motion, or shards by a pattern; the drawings that no plan trains on by default."),
    ] = None,
    where: Annotated[str, typer.Option(help="Filter by metadata, e.g. '{style: [noto]}'.")] = "{}",
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's let others in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8765,
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default=False)] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Upper bound; evenly thinned beyond it.")] = 1_000_000,
) -> None:
    """Opens a page to try a run on: type, draw or upload, and see what it finds and which experts took what.

    Examples:
      omnivl serve runs/quickstart
      omnivl serve runs/quickstart --data 'shards/*.tar' --port 8080
    """
    model = omnivl.load(run, stage=stage, device=device, plan=plan)
    takes = [media for name, media in _TAKES.items() if name in model.encoder.model.shows]
    gallery = open_gallery(data, parse_where(where), takes, max_samples)
    index: Index | str
    try:
        index = open_index(model, gallery, weights_hash(model.origin.weights), say)
    except DataError:
        raise
    except UserError as error:  # the stage has no embeddings: the page goes without search, and says why
        index = str(error)
    about = About(str(run), model.origin.stage, model.origin.step)
    answers = Answers(model, gallery, index, about)
    with PageServer(host, port, answers, PlainConsole(stderr=True).print) as server:
        if not is_loopback(host):
            say(f"--host {host}: whoever reaches this address can use the page; there is no password")
        try:
            say(f"try it: {server.url} (Ctrl-C ends)")
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
