"""The embeddings of a gallery and the structure that searches them: built once, kept beside the shards.

The file's name is a hash of shards and weights. It is the user's own or is built anew (``omnivl.data.signed_file``);
where the shards' folder cannot be written, it lies in the user's cache folder.

Shapes: N pictures and clips that could be read, D embedding size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.serve.gallery import Gallery, file_hash
from launcher.serve.media import Shown
from launcher.serve.model import Model
from launcher.serve.nearest import MANY, Embeddings, Exact, Nearest, Numbers, build_faiss, has_faiss, load_faiss
from omnivl.data.cache_folder import cache_folder
from omnivl.data.signed_file import Arrays, read_signed, write_signed
from omnivl.data.sources.base import BadSampleError
from omnivl.errors import DataError

INDEX_VERSION = 1
Progress = Callable[[str], None]

_CHUNK, _BATCH, _TELL_SECONDS, _ASKED = 256, 64, 5.0, 400
_LARGEST_ROW = 1 << 16  # bytes of an index for each sample, at most


@dataclass(frozen=True)
class Found:
    """A picture or clip of the gallery by its number, and the cosine with what was asked for."""

    number: int
    score: float


@dataclass(frozen=True)
class Index:
    """Searches a gallery.

    Attributes:
        nearest: Over the embeddings.
        numbers: int64, the number in the gallery of each embedding.
        left_out: How many samples of the gallery could not be read.
        per_sample: Embeddings of each sample.
    """

    nearest: Nearest
    numbers: Numbers
    left_out: int
    per_sample: int = 1

    def search(self, query: torch.Tensor, top: int) -> list[Found]:
        """The nearest of the gallery, the nearest first.

        Args:
            query: Unit-length embedding, ``[D]``, or several of one picture, ``[M, D]``: the largest cosine counts.
            top: How many.
        """
        queries = query.reshape(-1, query.shape[-1]).float().cpu().numpy()
        scores, rows = self.nearest.search(queries, top * self.per_sample)
        best: dict[int, float] = {}
        for score, row in zip(scores.ravel().tolist(), rows.ravel().tolist(), strict=True):
            if row >= 0:
                number = int(self.numbers[row])
                best[number] = max(score, best.get(number, -1.0))
        ordered = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))
        return [Found(number, score) for number, score in ordered[:top]]


def open_index(model: Model, gallery: Gallery, weights: str, say: Progress, many: int = MANY) -> Index:
    """Reads the index of a gallery, or builds and keeps it.

    Args:
        model: The model.
        gallery: What is searched.
        weights: Hash of the model's weights.
        say: Is told what takes long.
        many: From how many embeddings on FAISS is used, if it is installed.

    Raises:
        UserError: The model has no embeddings, or no sample can be read.
    """
    key = blake2b(repr((INDEX_VERSION, gallery.identity, weights)).encode(), digest_size=16).hexdigest()
    folders = [folder for folder in (gallery.folder, cache_folder()) if folder is not None]
    files = [folder / f"serve-{key}.safetensors" for folder in folders]
    most = (1 << 20) + len(gallery) * _LARGEST_ROW
    stored = next((found for file in files if (found := read_signed(file, most)) is not None), None)
    if stored is None:
        embeddings, numbers = _embed(model, gallery, say)
        stored = {"embeddings": embeddings, "numbers": numbers}
        _keep(files, stored, say)
    wants_faiss = has_faiss() and len(stored["numbers"]) >= many
    if wants_faiss and "faiss" not in stored:
        say(f"building FAISS's index of {len(stored['numbers']):,} embeddings")
        stored["faiss"] = build_faiss(stored["embeddings"], _likely_queries(model, gallery, stored))
        _keep(files, stored, say)
    nearest = load_faiss(stored["faiss"]) if wants_faiss else Exact(stored["embeddings"])
    samples = len(np.unique(stored["numbers"]))
    return Index(nearest, stored["numbers"], len(gallery) - samples, len(stored["numbers"]) // samples)


def weights_hash(path: Path) -> str:
    """Hash of a weights file, or of all files of weights in a folder."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return blake2b(repr([file_hash(file) for file in files]).encode(), digest_size=16).hexdigest()


def _keep(files: Sequence[Path], stored: Arrays, say: Progress) -> None:
    """Writes into the first folder that takes it."""
    if not any(write_signed(file, stored) for file in files):
        say(f"the index could not be kept in {files[0].parent}: the next start builds it again")


def _embed(model: Model, gallery: Gallery, say: Progress) -> tuple[Embeddings, Numbers]:
    """Embeddings ``[N, D]`` of all samples that can be read, and their numbers ``[N]``.

    Raises:
        UserError: The model has no embeddings.
        DataError: No sample can be read.
    """
    parts: list[NDArray[np.float32]] = []
    numbers: list[int] = []
    begun = told = time.monotonic()
    for chunk in _read(gallery):
        for media in ("image", "video"):
            own = [(number, shown) for number, shown in chunk if shown.media == media]
            if own:
                encode = model.encode_image if media == "image" else model.encode_video
                found = encode([shown.given for _, shown in own], batch_size=_BATCH).float().cpu().numpy()
                parts.append(found.reshape(-1, found.shape[-1]))
                several = len(parts[-1]) // len(own)
                numbers += [number for number, _ in own for _ in range(several)]
        if numbers and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            pace = len(numbers) / (told - begun)
            say(f"embedded {len(numbers):,} of {len(gallery):,}, {pace:,.0f} a second")
    if not numbers:
        raise DataError(f"data source {gallery.name!r}: none of its {len(gallery):,} pictures and clips can be read")
    return np.concatenate(parts), np.array(numbers, dtype=np.int64)


def _read(gallery: Gallery) -> Iterator[list[tuple[int, Shown]]]:
    """The samples that can be read, chunk by chunk; the next chunk is decoded while the model has the last one."""

    def decode(number: int) -> tuple[int, Shown] | None:
        try:
            return number, gallery.shown(number)
        except BadSampleError:
            return None

    with ThreadPoolExecutor(2) as pool:
        chunks = [range(first, min(first + _CHUNK, len(gallery))) for first in range(0, len(gallery), _CHUNK)]
        waiting = [pool.submit(decode, number) for number in chunks[0]]
        for after in [*chunks[1:], range(0)]:
            next_ones = [pool.submit(decode, number) for number in after]
            yield [one for future in waiting if (one := future.result()) is not None]
            waiting = next_ones


def _likely_queries(model: Model, gallery: Gallery, stored: Arrays) -> Embeddings:
    """Embeddings of some samples' captions; of the samples themselves where they have none."""
    numbers = stored["numbers"][:: max(1, len(stored["numbers"]) // _ASKED)].tolist()
    captions = [sample.captions[0] for sample in map(gallery.read, numbers) if sample.captions]
    if not captions:
        found: Embeddings = stored["embeddings"][:: max(1, len(stored["embeddings"]) // _ASKED)]
        return found
    asked: Embeddings = model.encode_text(captions).float().cpu().numpy()
    return asked
