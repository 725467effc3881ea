"""The loop that all converters share: entries in, shards and a manifest out, all or nothing.

The ``width`` and ``height`` of a video are written into its sample's JSON, unless the sample has fields of these names.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omnivl.data.convert.boxes import as_fractions
from omnivl.data.convert.entry import Entry, Reader, sample_key, short_hash
from omnivl.data.convert.media import (
    WRITTEN_EXTENSION,
    MediaKind,
    Verify,
    check_extension,
    cut,
    examine,
    shown_size,
    shrink,
)
from omnivl.data.convert.shards import FORMAT, MANIFEST, Manifest, ShardSet
from omnivl.data.formats import MEDIA_EXTENSIONS, picture_format, picture_size
from omnivl.data.orientation import upright_size
from omnivl.data.sources.base import BadSampleError, Rejection, naming
from omnivl.errors import DataError
from omnivl.randomness import stable_hash

Progress = Callable[[Manifest], None]

_HASH_RANGE = 2**63


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Attributes:
        max_samples: Samples per shard.
        max_bytes: Bytes per shard.
        shorter_side: Pixels that the shorter side is scaled down to; None copies every file untouched.
        splits: Share of each split, e.g. ``{"test": 0.1}``; the rest is ``train``. Empty: no split is made. The split
            is a function of the sample's identity, or of its name where it has none. A split named by the input stays.
        verify: ``header`` looks at the start of every file; ``full`` decodes it.
        overwrite: Replace an earlier conversion in the output folder.
    """

    max_samples: int = 10_000
    max_bytes: int = 1 << 30
    shorter_side: int | None = None
    splits: Mapping[str, float] = field(default_factory=dict)
    verify: Verify = "header"
    overwrite: bool = False

    def check(self) -> None:
        """Refuses values that are not allowed.

        Raises:
            DataError: Naming the option, its value and what is allowed.
        """
        for name, value in (("max_samples", self.max_samples), ("max_bytes", self.max_bytes)):
            if value < 1:
                raise DataError(f"{name} is {value}; allowed: 1 or more")
        if self.shorter_side is not None and self.shorter_side < 8:
            raise DataError(f"shorter_side is {self.shorter_side}; allowed: 8 pixels or more")
        if any(not 0 < share < 1 for share in self.splits.values()) or sum(self.splits.values()) >= 1:
            shares = ", ".join(f"{name}={share}" for name, share in self.splits.items())
            raise DataError(f"splits are {shares}; allowed: shares above 0 with a sum below 1, the rest is train")
        if "train" in self.splits:
            raise DataError("splits name train; it is what remains: name the others only, e.g. test=0.1")


def convert(reader: Reader, output: Path, options: ConvertOptions, progress: Progress | None = None) -> Manifest:
    """Writes all entries of ``reader`` into shards in ``output``.

    The folder is renamed to its final name when everything is written; until then, and if anything fails, it does not
    exist or is the old one. The same input and options give the same bytes.

    Args:
        reader: The input.
        output: Folder to make; it may exist if it is empty, or holds an earlier conversion and ``options.overwrite``.
        options: Size of shards, scaling, splits.
        progress: Called with the counts so far after every entry.

    Raises:
        DataError: The options, the output folder or the input as a whole cannot be used, or no sample was good.
    """
    options.check()
    _check_output(output, reader.inputs, options.overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had this id
    partial.mkdir()
    described = {name: value for name, value in asdict(options).items() if name != "overwrite"}
    manifest = Manifest(reader.form, described)
    shards = ShardSet(partial, manifest, options.max_samples, options.max_bytes)
    try:
        _write_all(reader, shards, manifest, options, progress)
        if not manifest.samples:
            raise DataError(_nothing_written(reader, shards.first_rejections, manifest))
        shards.close()
    except BaseException:
        shards.abandon()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _put_in_place(partial, output)
    return manifest


def _write_all(
    reader: Reader, shards: ShardSet, manifest: Manifest, options: ConvertOptions, progress: Progress | None
) -> None:
    seen: set[int] = set()  # hashes of names and keys: about 130 bytes per sample
    for entry in reader.entries():
        if isinstance(entry, Rejection):
            shards.reject(entry)
        else:
            try:
                _write_one(entry, shards, manifest, options, seen)
            except BadSampleError as error:
                shards.reject(error.rejection)
        if progress is not None:
            progress(manifest)


def _write_one(entry: Entry, shards: ShardSet, manifest: Manifest, options: ConvertOptions, seen: set[int]) -> None:
    name_hash = stable_hash("name", entry.name)
    if name_hash in seen:
        detail = f"{entry.name} was there before; put the rows of one file next to each other to join their captions"
        raise BadSampleError("duplicate_key", entry.where, detail)
    side = options.shorter_side
    named = {"": entry.path, **entry.pictures} if entry.path is not None else entry.pictures
    pictures = [
        _read_file(name, path, entry.where, options.verify, side, None if name else entry.seconds)
        for name, path in named.items()
    ]
    masks = [_read_file(name, path, entry.where, options.verify, None, None) for name, path in entry.masks.items()]
    fields = entry.fields()
    if pictures and "" in named and picture_format(pictures[0].data) is None:
        # What an index reads in a picture's header it reads of a video here.
        size = shown_size(pictures[0].data, entry.where)
        fields = ({} if size is None else {"width": size[0], "height": size[1]}) | fields
    for name, (form, value) in entry.boxes.items():
        size = pictures[0].size if pictures else None
        if size is None:
            raise BadSampleError("missing_media", entry.where, f"no picture for the boxes in {name!r}")
        fields[name] = as_fractions(value, form, size, name, entry.where, shards.reject)
    key = sample_key(entry.name)
    if stable_hash("key", key) in seen:  # a.jpg beside a.png
        key = f"{key}-{short_hash(entry.name)}"
    split = entry.split or draw_split(entry.identity or entry.name, options.splits)
    text = _encoded(fields | ({"split": split} if split else {}), entry.where)
    shards.write(key, {file.member: file.data for file in (*pictures, *masks)}, text, split, entry.where)
    seen.update((name_hash, stable_hash("key", key)))
    manifest.count(entry, [file.kind for file in pictures], split)


@dataclass(frozen=True)
class _File:
    """A picture or clip: extension in the shard, bytes, description, (width, height) of a picture."""

    member: str
    data: bytes
    kind: MediaKind
    size: tuple[int, int] | None


def _read_file(
    name: str,
    path: Path | bytes,
    where: str,
    verify: Verify,
    shorter_side: int | None,
    seconds: tuple[float, float] | None,
) -> _File:
    """Reads, examines and where asked cuts and scales a file of a sample; bytes are those of a PNG.

    Raises:
        BadSampleError: It cannot be read or is no picture or clip.
    """
    extension = "png" if isinstance(path, bytes) else path.suffix.lower().removeprefix(".")
    check_extension(extension, where)
    data = path if isinstance(path, bytes) else _bytes_of(path, where)
    with naming("unusable", where):
        if seconds is not None:
            data, extension = cut(data, seconds, shorter_side, where), WRITTEN_EXTENSION
        kind, size = examine(data, extension, where, verify, scaled=shorter_side is not None), picture_size(data)
        size = None if size is None else upright_size(size, data)
        if shorter_side is not None:
            data, extension = shrink(data, extension, shorter_side, where)
    return _File(f"{name}.{extension}" if name else extension, data, kind, size)


def _bytes_of(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError("missing_media", where, f"{path} does not exist") from error
    except OSError as error:
        raise BadSampleError("unreadable_path", where, f"{path}: {error.strerror}") from error
    except ValueError as error:  # a null byte in the name
        raise BadSampleError("unreadable_path", where, f"{str(path)!r}: {error}") from error


def _encoded(fields: Mapping[str, object], where: str) -> bytes:
    """A sample's JSON.

    Raises:
        BadSampleError: A text or the file's name has an invalid character.
    """
    try:
        return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{error.object[error.start]!a} is no character; rename the file or mend its text"
        raise BadSampleError("invalid_utf8", where, detail) from error


def draw_split(name: str, splits: Mapping[str, float]) -> str | None:
    """The split of a name: a pure function of both. None where no splits are asked for."""
    if not splits:
        return None
    place = stable_hash("split", name) / _HASH_RANGE
    for split, share in splits.items():
        if place < share:
            return split
        place -= share
    return "train"


def _check_output(output: Path, inputs: tuple[Path, ...], overwrite: bool) -> None:
    resolved = output.resolve()
    for source in inputs:
        if not source.exists():
            raise DataError(f"{source} does not exist; give the path of the input")
        place = source.resolve()
        inside_input = source.is_dir() and resolved.is_relative_to(place)
        if place.is_relative_to(resolved) or inside_input:
            raise DataError(f"the output {output} and the input {source} overlap; choose another output folder")
    if output.exists() and not output.is_dir():
        raise DataError(f"the output {output} is a file; give a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise DataError(f"the output folder {output} is not empty; choose another one, or replace it with --overwrite")
    if not _is_conversion(output):
        raise DataError(
            f"the output folder {output} holds no {MANIFEST} of an earlier conversion, so --overwrite does not "
            "delete it; empty it yourself or choose another one"
        )


def _is_conversion(folder: Path) -> bool:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _put_in_place(partial: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        output.rename(old)
    partial.rename(output)
    if old.exists():
        shutil.rmtree(old)


def _nothing_written(reader: Reader, first: list[Rejection], manifest: Manifest) -> str:
    """Says why no entry became a sample, with the first few."""
    sources = ", ".join(str(source) for source in reader.inputs)
    if not manifest.rejected:
        return f"{sources}: no picture or clip found; known extensions: {', '.join(sorted(MEDIA_EXTENSIONS))}"
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(manifest.rejected.items()))
    shown = "\n".join(f"  {entry.where}: {entry.cause}: {entry.detail}" for entry in first)
    return f"{sources}: no usable sample ({causes}); first ones:\n{shown}"
