"""The samples that a converter finds in its input, before any picture or clip is opened."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from omnivl.data.convert.boxes import BoxForm
from omnivl.data.sources.base import Rejection
from omnivl.randomness import stable_hash

_KEY_LENGTH = 80  # a tar header has 100 bytes for a name, and the extension goes there too
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_/-]+")


@dataclass(frozen=True)
class Entry:
    """One sample: usually a picture or clip with its texts and labels.

    Attributes:
        path: The sample's main media file; None if it has none.
        name: Unique name within the input, with ``/`` between folders: usually the path relative to the input's folder.
            Key and split are functions of it, so that neither changes when other files are added.
        where: ``FILE:LINE`` (or the file alone) for messages.
        captions: All captions, maybe none.
        label: Class name.
        identity: Name of the concept shown; all samples of one concept are in one split.
        split: Split given by the input.
        meta: Further fields for the sample's JSON.
        pictures: Further pictures or clips by name: ``left`` becomes ``KEY.left.jpg``.
        masks: Further files by name that are never scaled; or the bytes of a PNG that was drawn.
        seconds: From when to when ``path`` is cut, in seconds after its first frame; None takes all of it.
        boxes: Boxes in pixels by name, with their form, of the media file or else of the first of ``pictures``: one, a
            list, a list of lists, or a list of objects with a ``box`` each, of which those outside are left out.
    """

    path: Path | None
    name: str
    where: str
    captions: tuple[str, ...] = ()
    label: str | None = None
    identity: str | None = None
    split: str | None = None
    meta: Mapping[str, object] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    masks: Mapping[str, Path | bytes] = field(default_factory=dict)
    seconds: tuple[float, float] | None = None
    boxes: Mapping[str, tuple[BoxForm, object]] = field(default_factory=dict)

    def fields(self) -> dict[str, object]:
        """The sample's JSON, without unknown values."""
        fields: dict[str, object] = {**self.meta, "file": self.name}
        if len(self.captions) == 1:
            fields["caption"] = self.captions[0]
        elif self.captions:
            fields["captions"] = list(self.captions)
        known = {"label": self.label, "identity": self.identity, "split": self.split}
        return fields | {name: value for name, value in known.items() if value is not None}


class Reader(Protocol):
    """One form of input. Readers keep at most names and texts in memory, never pictures."""

    @property
    def form(self) -> str:
        """Name of the form, for the manifest."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files and folders that are read; the output folder must not contain them."""

    def count(self) -> int:
        """Approximate number of entries, for the progress bar."""

    def entries(self) -> Iterator[Entry | Rejection]:
        """Entries in an order that depends only on the input.

        Raises:
            DataError: The input as a whole cannot be used.
        """


def sample_key(name: str) -> str:
    """The key of a sample in its shard.

    WebDataset cuts at the first dot, and tar names are short: other characters than letters, digits, ``_``, ``-`` and
    ``/`` become ``_``, and a name that was changed gets a part of its hash, so that different names keep different
    keys.
    """
    stem = name.rpartition(".")[0] or name
    if "/" in name.rpartition(".")[2]:  # the only dot is in a folder's name
        stem = name
    plain = "/".join(part for part in _NOT_IN_KEYS.sub("_", stem).split("/") if part)
    if plain == stem and len(plain) <= _KEY_LENGTH:
        return plain
    return f"{plain[-_KEY_LENGTH:].strip('/')}-{short_hash(name)}"


def short_hash(name: str) -> str:
    """Eight hexadecimal digits of a name."""
    return f"{stable_hash('key', name) & 0xFFFFFFFF:08x}"


def texts_of(value: object) -> tuple[str, ...] | None:
    """Captions from a text or a list of texts, stripped, without empty ones; None if it is anything else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [text for text in values if isinstance(text, str)]
    if len(texts) != len(values):
        return None
    return tuple(text.strip() for text in texts if text.strip())
