"""``omnivl embed``: embeddings of a data source's pictures and captions, for search or for analysis."""

import json
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import torch
import typer

from engine.disk.trained import find_trained, load_encoder
from engine.plan.yaml import read_yaml
from engine.processes.process_group import choose_device
from engine.telemetry.console import say
from launcher.commands.outputs import require_writable
from omnivl.errors import UserError
from omnivl.inference.pictures import Media, PictureSet


def embed(
    target: Annotated[Path, typer.Argument(help="A run folder, or a .safetensors file.", show_default=False)],
    data: Annotated[str, typer.Option(help="emoji, motion, or shards by a pattern.", show_default=False)],
    media: Annotated[str, typer.Option(help="image or video.")] = "image",
    where: Annotated[str, typer.Option(help="Filter by metadata, e.g. '{style: [twemoji]}'.")] = "{}",
    out: Annotated[Path, typer.Option(help="The file to write, .npz.")] = Path("embeddings.npz"),
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan of weights that lie outside of a run.", show_default=False)
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Upper bound; evenly thinned beyond it.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line.")] = False,
) -> None:
    """Writes embeddings as .npz: keys, labels, pictures, captions with their texts and the row of the picture of each.

    Examples:
      omnivl embed runs/quickstart --data emoji --out embeddings.npz
      omnivl embed runs/quickstart --data emoji --out embeddings.npz --json
    """
    seen = parse_media(media)
    if out.suffix != ".npz":
        better = out.with_suffix(".npz") if out.name else out / "embeddings.npz"
        raise UserError(f"--out: got {out}; allowed is a name that ends in .npz; change it to {better}")
    chosen = parse_where(where)
    require_writable(out)
    trained = find_trained(target, stage, plan)
    with torch.no_grad():
        encoder = load_encoder(trained, choose_device(), batch_size)
        pictures = PictureSet(data, seen, chosen, encoder.model.inputs, max_samples, "media")
        owned = [(row, text) for row, sample in enumerate(pictures.samples) for text in sample.captions]
        arrays = {
            "keys": np.array([sample.key for sample in pictures.samples]),
            "labels": np.array([sample.label or "" for sample in pictures.samples]),
            "pictures": encoder.pictures(pictures).numpy(),
            "captions": np.array([text for _, text in owned], dtype=np.str_),
            "caption_rows": np.array([row for row, _ in owned], dtype=np.int64),
        }
        if owned:
            arrays["texts"] = encoder.texts([text for _, text in owned]).numpy()
    np.savez(out, allow_pickle=False, **arrays)
    width = arrays["pictures"].shape[-1]
    if as_json:
        said = {"plan": trained.plan.name, "stage": trained.stage.name, "step": trained.step, "data": data}
        counts = {"pictures": len(pictures), "captions": len(owned), "width": width}
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        typer.echo(json.dumps({"file": str(out), **said, **counts, "arrays": shapes}, indent=2))
        return
    say(f"{out}: {len(pictures)} pictures and {len(owned)} captions of stage {trained.stage.name}, {width} wide")


def parse_media(text: str) -> Media:
    """Which pictures to take.

    Raises:
        UserError: There is no such medium.
    """
    if text not in ("image", "video"):
        raise UserError(f"--media: got {text!r}; allowed are 'image', 'video'; change it to one of them")
    return cast(Media, text)


def parse_where(text: str) -> dict[str, tuple[str, ...]]:
    """A metadata filter from YAML: names, each with a value or a list of values.

    Raises:
        UserError: It is no such mapping.
    """
    document = read_yaml(text, "--where")
    if not isinstance(document.tree, dict) or document.problems:
        raise UserError(f"--where: got {text!r}; allowed is a mapping; write it as '{{style: [twemoji]}}'")
    lists = {name: value if isinstance(value, list) else [value] for name, value in document.tree.items()}
    return {str(name): tuple(str(value) for value in values) for name, values in lists.items()}
