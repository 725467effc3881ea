"""Samples of a training set that a test set has as well: the same pictures, or the same texts.

Training samples pass by in blocks and are compared with all test samples. Memory grows with the test set, by the
vectors of its pictures and the texts; not with the training set.

Shapes: T test samples, N training samples of a block, V and W vectors of a sample, D width of a vector.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.base import BadSampleError, Sample, Source
from omnivl.errors import DataError

BLOCK = 512
"""Samples that are read at a time."""

LARGEST_BLOCK = 1 << 24
"""Similarities that are held at a time, 64 MiB."""

Vectors = Callable[[Sequence[Sample], bool], tuple[list[int], NDArray[np.float32]]]
"""Vectors of samples by which they compare, and whether these are test samples.

Returns the places of those that could be read, n of them, and fp32 ``[n, V, D]``, each of length 1 or 0.
"""


@dataclass(frozen=True, order=True)
class Pair:
    """A training sample that has what a test sample has; the more alike the larger.

    Attributes:
        similarity: Cosine of the pictures' vectors; 1 for texts.
        train: Index in the training source.
        test: Index in the test source.
        train_where: The training sample's name.
        test_where: The test sample's name.
        what: Whether the pictures or the texts are alike.
        identical: Whether the files of the pictures are the same, byte for byte.
        vector: Which of the test sample's vectors was the most alike.
        text: The test sample's text.
    """

    similarity: float
    train: int
    test: int
    train_where: str
    test_where: str
    what: Literal["picture", "text"]
    identical: bool = False
    vector: int = 0
    text: str = ""


@dataclass
class Overlap:
    """What was found.

    Attributes:
        samples: Test samples, and training samples.
        unread: Pictures that could not be read, likewise.
        most: Pairs that are kept for each test sample, of pictures and of texts.
        counts: Of each test sample with pairs, their number, of pictures and of texts.
        same_files: Test samples whose picture's file is in the training set, byte for byte.
        kept: The most alike pairs of each test sample.
    """

    samples: dict[str, int]
    unread: dict[str, int]
    most: int
    counts: dict[str, Counter[int]] = field(default_factory=lambda: {"picture": Counter(), "text": Counter()})
    same_files: set[int] = field(default_factory=set)
    kept: dict[tuple[str, int], list[Pair]] = field(default_factory=dict)

    def add(self, pair: Pair) -> None:
        """Counts a pair, and keeps it if it is one of the most alike of its test sample."""
        self.counts[pair.what][pair.test] += 1
        if pair.identical:
            self.same_files.add(pair.test)
        own = self.kept.setdefault((pair.what, pair.test), [])
        if len(own) < self.most:
            heapq.heappush(own, pair)
        else:
            heapq.heappushpop(own, pair)

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that are kept, by test sample, the most alike of each first, pictures before texts."""
        ordered = sorted(self.kept.items(), key=lambda item: (item[0][1], item[0][0]))
        return [pair for _, own in ordered for pair in sorted(own, key=lambda one: (-one.similarity, one.train))]

    def figures(self) -> dict[str, int]:
        """How many samples and pairs there are."""
        pictures, texts = self.counts["picture"], self.counts["text"]
        return {
            "test_samples": self.samples["test"],
            "training_samples": self.samples["train"],
            "unread_test_pictures": self.unread["test"],
            "unread_training_pictures": self.unread["train"],
            "test_pictures_found": len(pictures),
            "test_pictures_found_as_the_same_file": len(self.same_files),
            "picture_pairs": pictures.total(),
            "test_samples_with_a_text_found": len(texts),
            "text_pairs": texts.total(),
            "test_samples_with_both": len(pictures.keys() & texts.keys()),
        }


def find_overlap(
    train: Source,
    test: Source,
    vectors: Vectors,
    threshold: float,
    *,
    spelled: Callable[[str], str],
    min_words: int = 4,
    most: int = 5,
    progress: Callable[[int], None] = lambda count: None,
) -> Overlap:
    """Compares all training samples with all test samples.

    Args:
        train: The training source.
        test: The test source.
        vectors: Makes vectors of pictures.
        threshold: Least cosine of a pair of pictures.
        spelled: A text in the spelling in which texts are compared for equality.
        min_words: Texts of fewer words are not compared; as they repeat everywhere.
        most: See ``Overlap``.
        progress: Is told the number of training samples that were compared.

    Raises:
        DataError: No picture of the test set can be read.
    """
    found = Overlap({"test": len(test), "train": len(train)}, {"test": 0, "train": 0}, most)
    known = _Known(threshold, spelled, min_words)
    for samples in _blocks(test, found, "test"):
        known.learn(samples, *_made(vectors, samples, found, "test"))
    if not known.places and len(test):
        raise DataError(f"none of {len(test)} test samples can be read; see `omnivl data inspect`")
    done = 0
    for samples in _blocks(train, found, "train"):
        for pair in known.pairs_of(samples, *_made(vectors, samples, found, "train")):
            found.add(pair)
        done += len(samples)
        progress(done)
    return found


Numbered = Sequence[tuple[int, Sample]]


def _blocks(source: Source, found: Overlap, side: str) -> Iterator[Numbered]:
    """The samples of a source that can be read, with their indices."""
    for start in range(0, len(source), BLOCK):
        samples = []
        for index in range(start, min(len(source), start + BLOCK)):
            try:
                samples.append((index, source.read(index)))
            except BadSampleError:
                found.unread[side] += 1
        yield samples


def _made(
    vectors: Vectors, samples: Numbered, found: Overlap, side: str
) -> tuple[list[int], NDArray[np.float32] | None]:
    """The indices of samples whose pictures can be read, and their vectors; None if there is none."""
    places, made = vectors([sample for _, sample in samples], side == "test") if samples else ([], None)
    found.unread[side] += len(samples) - len(places)
    return [samples[place][0] for place in places], made if places else None


class _Known:
    """What is known of the test set."""

    def __init__(self, threshold: float, spelled: Callable[[str], str], min_words: int) -> None:
        self.places: list[int] = []
        self._names: dict[int, str] = {}
        self._threshold, self._spelled, self._min_words = threshold, spelled, min_words
        self._parts: list[NDArray[np.float32]] = []
        self._files: dict[bytes, list[int]] = {}
        self._texts: dict[str, list[tuple[int, str]]] = {}

    def learn(self, samples: Numbered, places: list[int], vectors: NDArray[np.float32] | None) -> None:
        """Adds test samples."""
        self.places += places
        if vectors is not None:
            self._parts.append(vectors)
        for index, sample in samples:
            self._names[index] = sample.where
            if sample.media is not None:
                self._files.setdefault(_digest(sample.media), []).append(index)
            for text, spelled in self._said(sample).items():
                self._texts.setdefault(spelled, []).append((index, text))

    def pairs_of(self, samples: Numbered, places: list[int], vectors: NDArray[np.float32] | None) -> Iterator[Pair]:
        """The pairs of some training samples."""
        same = {
            (test, index)
            for index, sample in samples
            if sample.media is not None
            for test in self._files.get(_digest(sample.media), ())
        }
        names = {index: sample.where for index, sample in samples}
        for one, other, similarity, vector in [] if vectors is None else self._alike(vectors):
            test, train = self.places[one], places[other]
            identical = (test, train) in same
            same.discard((test, train))
            yield Pair(similarity, train, test, names[train], self._names[test], "picture", identical, vector)
        for test, train in sorted(same):  # of one colour, or not to be read
            yield Pair(1.0, train, test, names[train], self._names[test], "picture", identical=True)
        for index, sample in samples:
            told: set[int] = set()
            for spelled in self._said(sample).values():
                for test, text in self._texts.get(spelled, ()):
                    if test not in told:
                        told.add(test)
                        yield Pair(1.0, index, test, sample.where, self._names[test], "text", text=text)

    def _alike(self, vectors: NDArray[np.float32]) -> Iterator[tuple[int, int, float, int]]:
        """Places of test and training samples above the threshold, their similarity and the test sample's vector."""
        count, several, width = vectors.shape
        start, flat = 0, vectors.reshape(-1, width)
        for part in self._parts:
            step = max(1, LARGEST_BLOCK // (len(flat) * part.shape[1]))
            for first in range(0, len(part), step):
                own = part[first : first + step]
                cosines = (own.reshape(-1, width) @ flat.T).reshape(len(own), own.shape[1], count, several)
                each = cosines.max(axis=3)
                best = each.max(axis=1)
                for row, column in zip(*np.nonzero(best >= self._threshold), strict=True):
                    vector = int(each[row, :, column].argmax())
                    yield start + first + int(row), int(column), float(best[row, column]), vector
            start += len(part)

    def _said(self, sample: Sample) -> dict[str, str]:
        """The texts that are compared, each with its spelling."""
        said = {text: self._spelled(text) for text in sample.captions if len(text.split()) >= self._min_words}
        return {text: spelled for text, spelled in said.items() if spelled}


def _digest(media: bytes) -> bytes:
    return hashlib.sha256(media).digest()


def described(pair: Pair, views: Sequence[str]) -> dict[str, Any]:
    """A pair for a line of JSON.

    Args:
        pair: The pair.
        views: What the test sample's vectors are of; none if they have no names.
    """
    names = {"what": pair.what, "test": pair.test_where, "train": pair.train_where}
    if pair.what == "text":
        return {**names, "text": pair.text}
    view = {"view": views[pair.vector]} if views else {}
    return {**names, "similarity": round(pair.similarity, 4), "identical": pair.identical, **view}
