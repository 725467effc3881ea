"""``omnivl data overlap``: samples of a training set that a test set has as well."""

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.telemetry.console import PlainConsole, PlainTable
from launcher.commands.outputs import require_writable
from omnivl.data.overlap import Overlap, Vectors, described, find_overlap
from omnivl.data.overlap_page import render_overlap
from omnivl.data.picture_signature import THRESHOLD, VIEWS, signatures
from omnivl.errors import UserError
from omnivl.shown import printable_json

_EMBEDDING_THRESHOLD = 0.95


def overlap(
    train: Annotated[str, typer.Argument(help="Training data: shards by a pattern, emoji.", show_default=False)],
    test: Annotated[str, typer.Option(help="The test set, likewise.", show_default=False)],
    where: Annotated[str, typer.Option(help="Filter of the training data, e.g. '{split: [train]}'.")] = "{}",
    test_where: Annotated[str, typer.Option(help="Filter of the test set.")] = "{}",
    media: Annotated[str, typer.Option(help="image or video.")] = "image",
    run: Annotated[
        Path | None, typer.Option(help="Compare embeddings of this run, not pixels.", show_default=False)
    ] = None,
    stage: Annotated[str | None, typer.Option(help="The newest complete stage by default.", show_default=False)] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help=f"Least cosine: {THRESHOLD} of pixels, {_EMBEDDING_THRESHOLD} of embeddings."),
    ] = None,
    min_words: Annotated[int, typer.Option(min=1, help="Texts of fewer words are not compared.")] = 4,
    most: Annotated[int, typer.Option(min=1, help="Pairs that are written for each test sample, of each kind.")] = 5,
    out: Annotated[Path, typer.Option(help="The pairs, a line of JSON for each.")] = Path("overlap.jsonl"),
    html: Annotated[Path | None, typer.Option(help="Write a page of pairs to this file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Find pictures and texts of a test set in training data: copies, and near copies.

    Examples:
      omnivl data overlap emoji --test emoji --where '{split: [train]}' --test-where '{split: [test]}' --html pairs.html
      omnivl data overlap emoji --test emoji --test-where '{label: [bugs]}' --run runs/quickstart --json
    """
    # Here: the other commands of `data` need nothing of a model, and would start a second later.
    from launcher.commands.embed import parse_media, parse_where
    from omnivl.data.sources import open_source
    from omnivl.inference.pictures import EVALUATION_SEED, evaluation_entry
    from omnivl.tasks.spelling import comparable

    seen = parse_media(media)
    least = threshold if threshold is not None else THRESHOLD if run is None else _EMBEDDING_THRESHOLD
    if not 0 < least <= 1:
        raise UserError(f"--threshold: got {least}; allowed: above 0 and at most 1; change it")
    for file, said in ((out, "--out"), (html, "--html")):
        if file is not None:
            require_writable(file, said)
    entries = [
        evaluation_entry(source, seen, parse_where(text), "media")
        for source, text in ((train, where), (test, test_where))
    ]
    sources = [open_source(entry, seed=EVALUATION_SEED) for entry in entries]
    vectors: Vectors = signatures
    if run is not None:
        from engine.disk.trained import find_trained, load_encoder
        from engine.processes.process_group import choose_device
        from omnivl.inference.overlap import embeddings_of

        vectors = embeddings_of(load_encoder(find_trained(run, stage), choose_device()), seen)
    console = PlainConsole(stderr=as_json)
    with console.status(f"reading {test}") as status:
        found = find_overlap(
            sources[0],
            sources[1],
            vectors,
            least,
            spelled=comparable,
            min_words=min_words,
            most=most,
            progress=lambda count: status.update(f"{count:,} of {len(sources[0]):,} training samples"),
        )
    views = VIEWS if run is None else ()
    with out.open("w", encoding="utf-8") as written:
        written.writelines(json.dumps(described(pair, views), ensure_ascii=False) + "\n" for pair in found.pairs)
    if html is not None:
        html.write_text(render_overlap(found, sources[0], sources[1], f"{test} in {train}"), encoding="utf-8")
    if as_json:
        typer.echo(printable_json(json.dumps({"file": str(out), "threshold": least, **found.figures()}, indent=1)))
        return
    _print(console, found)
    console.print(f"pairs: {out}" + ("" if html is None else f"; page: {html}"))


def _print(console: PlainConsole, found: Overlap) -> None:
    table = PlainTable("", "number")
    for name, count in found.figures().items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)
