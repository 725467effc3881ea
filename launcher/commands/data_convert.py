"""``omnivl data convert``: one command per form of input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from omnivl.data.convert import (
    CocoReader,
    ConvertOptions,
    FolderReader,
    KineticsReader,
    Manifest,
    Reader,
    SSv2Reader,
    TableReader,
    convert,
)
from omnivl.data.convert.folder import FolderText
from omnivl.data.convert.media import Verify
from omnivl.data.convert.shards import REJECTED
from omnivl.data.inspect_page import readable_bytes
from omnivl.errors import DataError

app = typer.Typer(
    help="Convert a data set into tar shards. Shards of img2dataset and video2dataset need no conversion.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
SamplesPerShard = Annotated[int, typer.Option(help="Samples per shard.")]
MebibytesPerShard = Annotated[int, typer.Option(help="MiB per shard.")]
ShorterSide = Annotated[
    int | None, typer.Option(help="Scale down to this many pixels; without it every file is copied untouched.")
]
Split = Annotated[
    list[str] | None, typer.Option(help="NAME=SHARE of a split, e.g. test=0.1; can be repeated, the rest is train.")
]
Check = Annotated[Verify, typer.Option(help="Look at the start of every file, or decode it in full.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the manifest instead of tables.")]
SplitName = Annotated[str | None, typer.Option(help="Split of all samples; without it the one that the input names.")]

_PER_SHARD = 10_000
_MEBIBYTES = 1024


@app.command("folder")
def folder(
    root: Annotated[Path, typer.Argument(help="Folder of pictures or clips.")],
    out: Out,
    text: Annotated[FolderText, typer.Option(help="Sub-folders as classes, .txt as captions, or both.")] = "label",
    split_folders: Annotated[bool, typer.Option(help="The first sub-folder is the split.")] = False,
    samples_per_shard: SamplesPerShard = _PER_SHARD,
    shard_mebibytes: MebibytesPerShard = _MEBIBYTES,
    shorter_side: ShorterSide = None,
    split: Split = None,
    check: Check = "header",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """A folder: the class is the sub-folder's name, captions are .txt files of the same name.

    Examples:
      omnivl data convert folder pictures --out shards
      omnivl data convert folder clips --out shards --shorter-side 256 --split train=0.9 --split val=0.1
    """
    options = _options(samples_per_shard, shard_mebibytes, shorter_side, split, check, overwrite)
    _run(FolderReader(root, text, split_folders), out, options, as_json)


@app.command("table")
def table(
    file: Annotated[Path, typer.Argument(help="A .csv, .tsv, .json or .jsonl list.")],
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Where relative paths start; else the list's folder.")] = None,
    path: Annotated[str, typer.Option(help="Column with the file's path.")] = "path",
    caption: Annotated[list[str] | None, typer.Option(help="Column with a caption; can be repeated.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class name.")] = None,
    identity: Annotated[str | None, typer.Option(help="Column with the concept; a concept stays in one split.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column with the split.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Further column to keep; can be repeated.")] = None,
    samples_per_shard: SamplesPerShard = _PER_SHARD,
    shard_mebibytes: MebibytesPerShard = _MEBIBYTES,
    shorter_side: ShorterSide = None,
    split: Split = None,
    check: Check = "header",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """A CSV or JSON list of files; neighbouring rows of one file are its captions.

    Examples:
      omnivl data convert table list.csv --out shards --path file --caption title --caption alt
    """
    options = _options(samples_per_shard, shard_mebibytes, shorter_side, split, check, overwrite)
    reader = TableReader(file, root, path, tuple(caption or ()), label, identity, split_column, tuple(keep or ()))
    _run(reader, out, options, as_json)


@app.command("coco")
def coco(
    annotations: Annotated[Path, typer.Argument(help="captions_*.json, or Karpathy's dataset_*.json.")],
    images: Annotated[Path, typer.Argument(help="Folder of the pictures.")],
    out: Out,
    split_name: SplitName = None,
    samples_per_shard: SamplesPerShard = _PER_SHARD,
    shard_mebibytes: MebibytesPerShard = _MEBIBYTES,
    shorter_side: ShorterSide = None,
    split: Split = None,
    check: Check = "header",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """COCO captions.

    Examples:
      omnivl data convert coco annotations/captions_train2017.json train2017 --out shards
    """
    options = _options(samples_per_shard, shard_mebibytes, shorter_side, split, check, overwrite)
    _run(CocoReader(annotations, images, split_name), out, options, as_json)


@app.command("kinetics")
def kinetics(
    file: Annotated[Path, typer.Argument(help="CSV with label, youtube_id, time_start, time_end, split.")],
    clips: Annotated[Path, typer.Argument(help="Folder of the cut clips.")],
    out: Out,
    split_name: SplitName = None,
    samples_per_shard: SamplesPerShard = _PER_SHARD,
    shard_mebibytes: MebibytesPerShard = _MEBIBYTES,
    shorter_side: ShorterSide = None,
    split: Split = None,
    check: Check = "header",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Kinetics 400, 600, 700 and others of its form.

    Examples:
      omnivl data convert kinetics train.csv clips --out shards
    """
    options = _options(samples_per_shard, shard_mebibytes, shorter_side, split, check, overwrite)
    _run(KineticsReader(file, clips, split_name), out, options, as_json)


@app.command("ssv2")
def ssv2(
    entries: Annotated[Path, typer.Argument(help="something-something-v2-train.json or -validation.json.")],
    clips: Annotated[Path, typer.Argument(help="Folder of the .webm clips.")],
    out: Out,
    labels: Annotated[Path | None, typer.Option(help="labels.json, to check the classes against.")] = None,
    split_name: SplitName = None,
    samples_per_shard: SamplesPerShard = _PER_SHARD,
    shard_mebibytes: MebibytesPerShard = _MEBIBYTES,
    shorter_side: ShorterSide = None,
    split: Split = None,
    check: Check = "header",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Something-Something v2.

    Examples:
      omnivl data convert ssv2 train.json clips --out shards --labels labels.json
    """
    options = _options(samples_per_shard, shard_mebibytes, shorter_side, split, check, overwrite)
    _run(SSv2Reader(entries, clips, labels, split_name), out, options, as_json)


def _options(
    samples: int, mebibytes: int, shorter_side: int | None, split: list[str] | None, check: Verify, overwrite: bool
) -> ConvertOptions:
    return ConvertOptions(samples, mebibytes << 20, shorter_side, parse_splits(split or []), check, overwrite)


def parse_splits(texts: list[str]) -> dict[str, float]:
    """Shares by split from ``NAME=SHARE``.

    Raises:
        DataError: A text is not of this form, or a name is there twice.
    """
    splits: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            value = float(share)
        except ValueError:
            raise DataError(f"--split {text}: allowed: NAME=SHARE, e.g. --split test=0.1") from None
        if not name or name in splits:
            raise DataError(f"--split {text}: {'the name is there twice' if name else 'the name is missing'}")
        splits[name] = value
    return splits


def _run(reader: Reader, out: Path, options: ConvertOptions, as_json: bool) -> None:
    missing = [str(path) for path in reader.inputs if not path.exists()]
    if missing:
        raise DataError(f"{missing[0]} does not exist; give the path of the input")
    with progress_bar(out.name, reader.count()) as update:
        manifest = convert(reader, out, options, update)
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
    else:
        _print_summary(Console(emoji=False), manifest, out)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[Manifest], None]]:
    """A bar on the error stream, so that ``--json`` can be piped."""
    console = Console(stderr=True, emoji=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)

        def update(manifest: Manifest) -> None:
            bad = manifest.rejected.total()
            shown = f"{title}, {bad} bad" if bad else title
            progress.update(task, completed=manifest.samples + bad, description=shown)

        yield update


def _print_summary(console: Console, manifest: Manifest, out: Path) -> None:
    size = readable_bytes(sum(shard.bytes for shard in manifest.shards))
    kinds = ", ".join(f"{count:,} {kind}s" for kind, count in sorted(manifest.kinds.items()))
    console.print(
        f"[bold]{manifest.samples:,} samples[/] ({kinds}) in {len(manifest.shards)} shards, {size}: {escape(str(out))}"
    )
    console.print(
        f"{manifest.captions:,} captions, {manifest.with_label:,} labelled in {len(manifest.labels):,} classes"
    )
    if set(manifest.splits) - {""}:
        console.print("splits: " + ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.splits.items())))
    if manifest.rejected:
        bad = Table("cause", "entries", title="Left out", title_justify="left")
        for cause, count in sorted(manifest.rejected.items()):
            bad.add_row(cause.replace("_", " "), f"{count:,}")
        console.print(bad)
        console.print(f"each is a line of {escape(str(out / REJECTED))}")
