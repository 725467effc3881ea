"""Finds clips by name in a folder, whatever sub-folders a downloader made."""

import os
from collections.abc import Mapping
from pathlib import Path

from omnivl.data.convert.records import Record
from omnivl.data.formats import CLIP_EXTENSIONS
from omnivl.errors import DataError


def find_clips(root: Path) -> dict[str, Path]:
    """Paths of all clips below ``root`` by file name without extension; the first in sorted order where names repeat.

    Raises:
        DataError: The folder does not exist or has no clip.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder of the clips")
    clips: dict[str, Path] = {}
    for folder, below, files in os.walk(root, followlinks=True):
        below.sort()
        for name in sorted(files):
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() in CLIP_EXTENSIONS:
                clips.setdefault(stem, Path(folder, name))
    if not clips:
        known = ", ".join(sorted(CLIP_EXTENSIONS))
        raise DataError(f"{root}: no clip in this folder or below; known extensions: {known}")
    return clips


def clip_of(clips: Mapping[str, Path], record: Record, *names: str) -> Path:
    """The clip of the first of some names that one has, each as it is or without its extension.

    Raises:
        BadSampleError: ``missing_media``.
    """
    for name in names:
        for stem in (name, Path(name).stem):
            if stem in clips:
                return clips[stem]
    record.refuse("missing_media", f"no clip {' or '.join(names)} in the folder of clips or below")
