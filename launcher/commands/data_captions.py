"""``omnivl data captions``: shards whose captions a trained stage has written, or filtered, or both."""

from pathlib import Path
from typing import Annotated

import typer

from omnivl.errors import UserError


def captions(
    data: Annotated[str, typer.Argument(help="Shards by a pattern, or emoji.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    captioner: Annotated[
        Path | None, typer.Option(help="A run folder whose stage writes a caption of each.", show_default=False)
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(
            "--filter", help="A run folder whose stage takes out captions that do not match.", show_default=False
        ),
    ] = None,
    where: Annotated[str, typer.Option(help="Filter of the data, e.g. '{split: [train]}'.")] = "{}",
    media: Annotated[str, typer.Option(help="image or video.")] = "image",
    writes: Annotated[str, typer.Option(help="The captioner's objective.")] = "lm",
    matches: Annotated[str, typer.Option(help="The filter's objective.")] = "vlm",
    least: Annotated[
        float, typer.Option(min=-1000, max=1000, help="Least log odds of a match that the filter keeps.")
    ] = 0.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Of the captioner; 1 is greedy.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier conversion in the output folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest instead of a line.")] = False,
) -> None:
    """Write captions of pictures by a trained stage, and take out those that do not match.

    Examples:
      omnivl data captions emoji --where '{label: [bugs]}' --captioner runs/quickstart --out captioned
    """
    # Here: the other commands of `data` need nothing of a model, and would start a second later.
    from engine.disk.trained import find_trained, load_encoder
    from engine.processes.process_group import choose_device
    from engine.telemetry.console import say
    from launcher.commands.data_convert import progress_bar
    from launcher.commands.embed import parse_media, parse_where
    from omnivl.data.convert.run import ConvertOptions, convert
    from omnivl.data.sources import open_source
    from omnivl.inference.encoder import Encoder
    from omnivl.inference.pictures import EVALUATION_SEED, evaluation_entry
    from omnivl.shown import printable_json
    from omnivl.tasks.needs import Head, Need, Provided, ScoresPairs, Shown
    from omnivl.tasks.recaption import Captioner, Filter, Recaptioned

    if captioner is None and judge is None:
        raise UserError("got neither --captioner nor --filter; allowed is one of them, or both; name a run folder")

    kind = parse_media(media)
    entry = evaluation_entry(data, kind, parse_where(where), "media")

    def loaded(option: str, run: Path, *needs: Need) -> Encoder:
        """The newest stage of the run that an option names, which has to meet the needs."""
        trained = find_trained(run, None, None)
        for need in (*needs, Shown(kind)):
            lack = need.lack(Provided(trained.stage.model, trained.stage.objectives))
            if lack is not None:
                stage = f"stage {trained.stage.name!r}"
                raise UserError(f"{option} {run}: {stage} {lack.what}; {lack.remedy}, or name another run")
        return load_encoder(trained, choose_device(), batch_size)

    writer = None if captioner is None else Captioner(loaded("--captioner", captioner, Head(writes)), writes, num_beams)
    matching = None if judge is None else Filter(loaded("--filter", judge, ScoresPairs(matches)), matches, least)
    sizes = next(one for one in (writer, matching) if one is not None).encoder.model.inputs
    source = open_source(entry, seed=EVALUATION_SEED, num_frames=sizes.num_frames, size=sizes.video_size)
    inputs = tuple(one for one in (Path(data),) if one.exists())
    reader = Recaptioned(source, kind, writer, matching, inputs)
    with progress_bar(out.name, reader.count()) as update:
        manifest = convert(reader, out, ConvertOptions(overwrite=overwrite), update)
    if as_json:
        typer.echo(printable_json(manifest.to_json()), nl=False)
        return
    left = manifest.rejected.total()
    say(f"{out}: {manifest.samples} samples with {manifest.captions} captions; {left} samples left out")
