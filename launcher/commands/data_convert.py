"""``omnivl data convert``: one command per form of input."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from engine.telemetry.console import PlainConsole, PlainTable, titled
from launcher.commands.signature import set_options
from omnivl.data.convert import (
    FORMS,
    ConvertOptions,
    FolderReader,
    FormReader,
    Manifest,
    Reader,
    TableReader,
    convert,
)
from omnivl.data.convert.boxes import BOX_FORMS, BoxForm
from omnivl.data.convert.folder import FolderText
from omnivl.data.convert.media import Verify
from omnivl.data.convert.shards import REJECTED
from omnivl.data.inspect_page import readable_bytes
from omnivl.docstrings import attribute_texts, section
from omnivl.errors import DataError
from omnivl.shown import printable, printable_json

app = typer.Typer(
    help="Convert a data set into tar shards. Shards of img2dataset and video2dataset need no conversion.",
    no_args_is_help=True,
)


def _convert(
    reader: Reader,
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 10_000,
    shard_mebibytes: Annotated[int, typer.Option(min=1, help="MiB per shard.")] = 1024,
    shorter_side: Annotated[
        int | None,
        typer.Option(min=8, help="Scale down to this many pixels; without it every file is copied untouched."),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE of a split, e.g. test=0.1; can be repeated, the rest is train.")
    ] = None,
    check: Annotated[Verify, typer.Option(help="Look at the start of every file, or decode it in full.")] = "header",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier conversion in the output folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest instead of tables.")] = False,
) -> None:
    """Converts the entries of a reader. Its options are those of every command of this group."""
    options = ConvertOptions(
        samples_per_shard, shard_mebibytes << 20, shorter_side, parse_splits(split or []), check, overwrite
    )
    missing = [str(path) for path in reader.inputs if not path.exists()]
    if missing:
        raise DataError(f"{missing[0]} does not exist; give the path of the input")
    with progress_bar(out.name, reader.count()) as update:
        manifest = convert(reader, out, options, update)
    if as_json:
        typer.echo(printable_json(manifest.to_json()), nl=False)
    else:
        _print_summary(PlainConsole(), manifest, out)


def _command(make_reader: Callable[..., Reader]) -> Callable[..., Reader]:
    """Adds a command with the function's name and docstring; it takes its options and those of ``_convert``.

    Args:
        make_reader: Makes a reader from the function's options.
    """
    own = inspect.signature(make_reader).parameters
    shared = dict(list(inspect.signature(_convert).parameters.items())[1:])

    def run(**given: Any) -> None:
        reader = make_reader(**{name: given.pop(name) for name in own})
        _convert(reader, **given)

    options = (*own.values(), *shared.values())
    set_options(run, sorted(options, key=lambda option: option.default is not option.empty))  # required ones first
    run.__doc__ = make_reader.__doc__
    app.command(make_reader.__name__)(run)
    return make_reader


@_command
def folder(
    root: Annotated[Path, typer.Argument(help="Folder of pictures or clips.")],
    text: Annotated[FolderText, typer.Option(help="Sub-folders as classes, .txt as captions, or both.")] = "label",
    split_folders: Annotated[bool, typer.Option(help="The first sub-folder is the split.")] = False,
) -> Reader:
    """A folder: the class is the sub-folder's name, captions are .txt files of the same name.

    Examples:
      omnivl data convert folder pictures --out shards
      omnivl data convert folder clips --out shards --shorter-side 256 --split val=0.1
    """
    return FolderReader(root, text, split_folders)


@_command
def table(
    file: Annotated[Path, typer.Argument(help="A .csv, .tsv, .json, .jsonl or .parquet list.")],
    root: Annotated[Path | None, typer.Option(help="Where relative paths start; else the list's folder.")] = None,
    path: Annotated[str, typer.Option(help='Column with the file\'s path; "" for none.')] = "path",
    caption: Annotated[list[str] | None, typer.Option(help="Column with a caption; can be repeated.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class name.")] = None,
    identity: Annotated[str | None, typer.Option(help="Column with the concept; a concept stays in one split.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column with the split.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Further column to keep; can be repeated.")] = None,
    picture: Annotated[list[str] | None, typer.Option(help="NAME=COLUMN of another picture; can be repeated.")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="NAME=COLUMN of a mask; can be repeated.")] = None,
    boxes: Annotated[list[str] | None, typer.Option(help="COLUMN=xywh or COLUMN=xyxy, boxes in pixels.")] = None,
    row_is_sample: Annotated[bool, typer.Option("--row-is-sample", help="Each row is a sample of its own.")] = False,
    separator: Annotated[str | None, typer.Option(help='Between columns, e.g. ";" or tab; else as the suffix.')] = None,
    quotes: Annotated[bool | None, typer.Option(help="Quotes enclose values; else in .csv, not in .tsv.")] = None,
) -> Reader:
    """A CSV, TSV, JSON or Parquet list of files; neighbouring rows of one file are its captions.

    Examples:
      omnivl data convert table list.csv --out shards --path file --caption title --caption alt
      omnivl data convert table cc3m.tsv --out shards --path file --caption caption
      omnivl data convert table list.csv --out shards --separator ";" --caption title
      omnivl data convert table vqa.json --out shards --path image --keep question --keep answers --row-is-sample
      omnivl data convert table pairs.csv --out shards --path "" --picture left=a --picture right=b --caption text
    """
    pictures, masks = named_columns("--picture", picture), named_columns("--mask", mask)
    forms: dict[str, BoxForm] = {}
    for column, form in named_columns("--boxes", boxes).items():
        known = next((one for one in BOX_FORMS if one == form), None)
        if known is None:
            raise DataError(f"--boxes {column}={form}: allowed: COLUMN=xywh or COLUMN=xyxy")
        forms[column] = known
    return TableReader(
        file,
        root,
        path or None,
        tuple(caption or ()),
        label,
        identity,
        split_column,
        tuple(keep or ()),
        pictures,
        masks,
        forms,
        row_is_sample,
        None if separator is None else _separator(separator),
        quotes,
    )


def _separator(given: str) -> str:
    r"""One letter between columns; ``tab`` and ``\t`` are words for one that shells hide.

    Raises:
        DataError: It is no single letter, or one that a row needs for itself.
    """
    letter = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(letter) != 1 or letter in '"\r\n':
        raise DataError(f"--separator {given!r}: allowed: one letter such as ';', or tab")
    return letter


def _form_command(cls: type[FormReader]) -> None:
    """Adds the command of a public data set: its arguments and options are the fields of the reader.

    Args:
        cls: The reader; its docstring has the help and what each field is.
    """
    texts, types = attribute_texts(cls), get_type_hints(cls)
    parameters = [_parameter(one, types[one.name], texts[one.name]) for one in fields(cls)]

    def make(**given: Any) -> Reader:
        values = {_FIELDS.get(name, name): value for name, value in given.items() if value is not None}
        fitting: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fitting)

    set_options(make, parameters)
    make.__name__ = cls.form
    summary = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[0]
    make.__doc__ = f"{summary}\nExamples:\n{section(cls, 'Examples')}"
    _command(make)


_FIELDS = {"split_name": "split"}
"""Options that are called otherwise than their field: ``--split`` draws splits in every command."""


def _parameter(one: Field[Any], annotation: Any, text: str) -> inspect.Parameter:
    """The argument or option of a reader's field."""
    required = one.default is MISSING
    if annotation == tuple[Path, ...]:
        annotation, default = list[Path] | None, None
    else:
        default = inspect.Parameter.empty if required else one.default
    names = {field: name for name, field in _FIELDS.items()}
    words = (f"--{one.name.replace('_', '-')}",) if annotation is bool else ()  # without a --no- of it
    described = typer.Argument(help=text, show_default=False) if required else typer.Option(*words, help=text)
    return inspect.Parameter(
        names.get(one.name, one.name),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, described],
    )


for _cls in FORMS:
    _form_command(_cls)


def named_columns(option: str, texts: list[str] | None) -> dict[str, str]:
    """The values of an option of the form ``NAME=VALUE``, by name.

    Raises:
        DataError: A text is not of this form, or a name is there twice or cannot be part of a file's name.
    """
    named: dict[str, str] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if not name or not value or name in named or (option != "--boxes" and not name.isidentifier()):
            raise DataError(f"{option} {text}: allowed: NAME=VALUE, each name once, of letters, digits and '_'")
        named[name] = value
    return named


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


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[Manifest], None]]:
    """A bar on the error stream, so that ``--json`` can be piped."""
    console = PlainConsole(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(printable(title), total=total)

        def update(manifest: Manifest) -> None:
            bad = manifest.rejected.total()
            shown = printable(f"{title}, {bad} bad" if bad else title)
            progress.update(task, completed=manifest.samples + bad, description=shown)

        yield update


def _print_summary(console: PlainConsole, manifest: Manifest, out: Path) -> None:
    size = readable_bytes(sum(shard.bytes for shard in manifest.shards))
    kinds = ", ".join(f"{count:,} {kind}s" for kind, count in sorted(manifest.kinds.items()))
    console.print(
        titled(f"{manifest.samples:,} samples", f" ({kinds}) in {len(manifest.shards)} shards, {size}: {out}")
    )
    console.print(
        f"{manifest.captions:,} captions, {manifest.with_label:,} labelled in {len(manifest.labels):,} classes"
    )
    if set(manifest.splits) - {""}:
        console.print("splits: " + ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.splits.items())))
    if manifest.rejected:
        bad = PlainTable("cause", "entries", title="Left out")
        for cause, count in sorted(manifest.rejected.items()):
            bad.add_row(cause.replace("_", " "), f"{count:,}")
        console.print(bad)
        console.print(f"each is a line of {out / REJECTED}")
