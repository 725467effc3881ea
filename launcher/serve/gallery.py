"""The pictures and clips that a page searches, read from their sources one by one."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from engine.telemetry.environment import package_versions
from launcher.serve.media import Shown, decoded
from omnivl.data.emoji.unpack import embedded_shards
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.sources import open_source
from omnivl.data.sources.base import NothingLeftError, Sample, Source
from omnivl.data.sources.generated import GENERATED
from omnivl.data.sources.patterns import expand_pattern
from omnivl.errors import DataError
from omnivl.inference.pictures import EVALUATION_SEED, Media, evaluation_entry

Where = Mapping[str, tuple[str, ...]]

UNSEEN: Mapping[Media, Where] = {"image": {"style": ("twemoji",)}, "video": {"split": ("val", "test")}}
"""Of the embedded drawings, those that no plan of ours trains on: a style, and animations of concepts."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Part:
    """The pictures or the clips of a source.

    Attributes:
        media: ``image`` or ``video``.
        source: The samples.
        count: How many of them are taken, evenly thinned.
    """

    media: Media
    source: Source
    count: int

    def read(self, index: int) -> Sample:
        """The sample at ``index`` of ``count``."""
        return self.source.read(index * len(self.source) // self.count)


class Gallery:
    """Pictures, then clips, numbered from 0.

    Attributes:
        name: What they are, in words.
        identity: Equal where all samples are.
        folder: Where their shards lie; None where they are generated.
        labels: The names of their classes, sorted.
    """

    def __init__(self, name: str, parts: Sequence[Part], identity: str, folder: Path | None) -> None:
        """Takes what ``open_gallery`` found."""
        self.name, self.identity, self.folder = name, identity, folder
        self._parts = tuple(parts)
        self.labels = tuple(sorted({label for part in parts for label in part.source.classes}))

    def __len__(self) -> int:
        return sum(part.count for part in self._parts)

    def counts(self) -> dict[Media, int]:
        """How many pictures and clips there are."""
        return {part.media: part.count for part in self._parts}

    def media(self, number: int) -> Media:
        """Whether a number is that of a picture or of a clip."""
        return self._find(number)[0].media

    def read(self, number: int) -> Sample:
        """A sample.

        Raises:
            BadSampleError: It cannot be read.
        """
        part, index = self._find(number)
        return part.read(index)

    def shown(self, number: int) -> Shown:
        """A sample's pixels.

        Raises:
            BadSampleError: It cannot be read or decoded.
        """
        return decoded(self.read(number), self.media(number), DEFAULT_LIMITS)

    def _find(self, number: int) -> tuple[Part, int]:
        assert 0 <= number < len(self), "a number of this gallery"
        for part in self._parts:
            if number < part.count:
                return part, number
            number -= part.count
        raise AssertionError("parts add up to the gallery")


def open_gallery(data: str | None, where: Where, takes: Sequence[Media], max_samples: int) -> Gallery:
    """Opens the pictures and clips of a source.

    Args:
        data: ``emoji``, ``motion``, or shards by a pattern; None takes ``UNSEEN`` of the embedded drawings.
        where: Filter by metadata.
        takes: What the model takes of pictures and clips.
        max_samples: Upper bound for each of both; evenly thinned beyond it.

    Raises:
        DataError: There is no such source, or it has neither.
    """
    source, lacking, parts, said = data or "emoji", [], [], []
    for media in takes:
        chosen = {**UNSEEN[media], **where} if data is None else where
        entry = evaluation_entry(source, media, chosen, "media")
        try:
            opened = open_source(entry, seed=EVALUATION_SEED)
        except NothingLeftError as error:
            lacking.append(error)
            continue
        parts.append(Part(media, opened, min(len(opened), max_samples)))
        said.append(f"{media} {dict(chosen)} {len(opened)} {parts[-1].count}")
    if not parts:
        raise (
            lacking[0] if lacking else DataError(f"data source {source!r}: the model takes neither pictures nor clips")
        )
    files = _files(source)
    identity = blake2b(repr((source if not files else "", said, _contents(files))).encode(), digest_size=16)
    name = "drawings in a style that no plan trains on" if data is None else source
    return Gallery(name, parts, identity.hexdigest(), files[0].parent if files else None)


def _files(source: str) -> list[Path]:
    """The shards of a source, in order; none where its samples are generated."""
    if source in GENERATED:
        return []
    return list(embedded_shards()) if source == "emoji" else [Path(path) for path in expand_pattern(source)]


def _contents(files: Sequence[Path]) -> list[str]:
    """Hashes of files; of what is generated, the version of the package that does it."""
    if not files:
        return [str(package_versions()["omnivl-engine"])]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(file_hash, files))


def file_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
