"""A folder of pictures or clips: the class is the sub-folder's name, captions are ``.txt`` files of the same name.

The folders that img2dataset and video2dataset write as ``files`` are read as well: a ``.json`` beside a picture has its
further fields, and its captions where there is no ``.txt``; their tables and statistics are passed over.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omnivl.data.convert.entry import Entry
from omnivl.data.formats import MEDIA_EXTENSIONS
from omnivl.data.plain_files import text_lines
from omnivl.data.record import Record, parse_record
from omnivl.data.sources.base import BadSampleError, Rejection
from omnivl.errors import DataError

FolderText = Literal["label", "caption", "both"]

_STATISTICS = re.compile(r"([0-9]+)_stats\.json")
_NOTES = re.compile(r"[0-9]+(_stats\.json|\.parquet)")
_ENTRY_FIELDS = ("label", "split", "file")  # of a JSON: the folders say them


@dataclass(frozen=True)
class FolderReader:
    """Reads ``ROOT/CLASS/.../FILE`` and ``ROOT/.../FILE`` + ``FILE.txt``.

    Attributes:
        root: The folder. Names that begin with a dot are passed over.
        text: ``label`` takes the first sub-folder's name as class; ``caption`` needs a ``.txt`` file beside each
            picture, each line a caption; ``both`` takes the class, and captions where they exist.
        split_folders: The first sub-folder is the split, the second the class: ``ROOT/train/CLASS/FILE``.
    """

    root: Path
    text: FolderText = "label"
    split_folders: bool = False

    @property
    def form(self) -> str:
        """Name of the form."""
        return "folder"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The folder."""
        return (self.root,)

    def count(self) -> int:
        """Files of a known extension."""
        return sum(
            1 for folder in _folders(self.root) for path in _files(folder) if _extension(path) in MEDIA_EXTENSIONS
        )

    def entries(self) -> Iterator[Entry | Rejection]:
        """Files in the order of their names, folder by folder.

        Raises:
            DataError: It is no folder, or the sub-folders are no classes but what a downloader made.
        """
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; give the folder that holds the pictures or clips")
        downloaded = self._is_downloaded()
        if downloaded and self.text != "caption":
            raise DataError(
                f"{self.root} was written by a downloader (img2dataset, video2dataset): its sub-folders are numbers, "
                "not classes; give --text caption"
            )
        for folder in _folders(self.root):
            files = _files(folder)
            stems = {path.stem for path in files if _extension(path) in MEDIA_EXTENSIONS}
            for path in files:
                if _extension(path) == "json" and path.stem in stems:
                    continue  # read with its picture
                if downloaded and folder == self.root and _NOTES.fullmatch(path.name):
                    continue
                if _extension(path) == "txt" and self.text != "label":
                    if path.stem not in stems:
                        yield Rejection("missing_media", str(path), "no picture or clip of this name lies beside it")
                else:
                    yield self._entry(path)

    def _is_downloaded(self) -> bool:
        """Whether a file with statistics lies beside a sub-folder of the same number."""
        found = (_STATISTICS.fullmatch(path.name) for path in _files(self.root))
        return any((self.root / match.group(1)).is_dir() for match in found if match is not None)

    def _entry(self, path: Path) -> Entry | Rejection:
        relative = path.relative_to(self.root)
        where, name = str(path), relative.as_posix()
        folders = list(relative.parts[:-1])
        split = None
        if self.split_folders:
            if not folders:
                return Rejection("missing_label", where, "lies in no split's folder; move it to ROOT/SPLIT/...")
            split = folders.pop(0)
        label = folders[0] if folders and self.text != "caption" else None
        if label is None and self.text != "caption":
            change = "move it to ROOT/CLASS/"
            if path.with_suffix(".txt").exists():
                change += ", or take the .txt beside each picture as its caption (--text caption)"
            return Rejection("missing_label", where, f"lies in no class's folder; {change}")
        try:
            record = _record(path.with_suffix(".json"))
        except BadSampleError as error:
            return error.rejection
        captions: tuple[str, ...] = ()
        sidecar = path.with_suffix(".txt")
        if self.text != "label":
            try:
                lines = text_lines(sidecar.read_text(encoding="utf-8-sig"))
                captions = tuple(line.strip() for line in lines if line.strip())
            except FileNotFoundError:
                captions = ()
            except UnicodeDecodeError as error:
                return Rejection("invalid_utf8", str(sidecar), f"byte at offset {error.start}; save the file as UTF-8")
            except OSError as error:
                return Rejection("unreadable_path", str(sidecar), error.strerror or str(error))
            captions = captions or tuple(text for texts in record.captions.values() for text in texts)
            if not captions and self.text == "caption":
                return Rejection("missing_caption", where, f"write a caption into {sidecar.name}, one per line")
        meta = {field: value for field, value in record.meta.items() if field not in _ENTRY_FIELDS}
        return Entry(path, name, where, captions, label, record.identity, split, meta)


def _record(file: Path) -> Record:
    """What the JSON beside a picture says; nothing where there is none.

    Raises:
        BadSampleError: It cannot be read, or is no object.
    """
    try:
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError:
        return parse_record({}, str(file))
    except OSError as error:
        raise BadSampleError("unreadable_path", str(file), error.strerror or str(error)) from error
    return parse_record({"json": data}, str(file))


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _folders(root: Path) -> Iterator[Path]:
    """The folder and all below it, in the order of their names. Links are followed, but not in circles."""
    stack: list[tuple[Path, frozenset[str]]] = [(root, frozenset())]
    while stack:
        folder, above = stack.pop()
        real = os.path.realpath(folder)
        if real in above:
            continue
        yield folder
        below = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
        stack.extend((path, above | {real}) for path in sorted(below, reverse=True))


def _files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and not entry.is_dir())
