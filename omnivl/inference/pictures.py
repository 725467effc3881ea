"""Samples of an evaluation, in a fixed order, split over replicas.

Training counts a bad sample and replaces it by another one. In an evaluation that would change the score, so here a bad
sample is an error.
"""

import base64
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from omnivl.chain.gather import Gather
from omnivl.chain.pictures import Pictures
from omnivl.data.augment import evaluation_placement
from omnivl.data.batch import DataKind, is_video
from omnivl.data.collate import in_strips
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.decode import MIDDLE, Shot, evaluation_frames, still_size
from omnivl.data.example import members_as_samples
from omnivl.data.placement import Placement
from omnivl.data.sizes import InputSizes, SizeOf
from omnivl.data.sources import open_source
from omnivl.data.sources.base import BadSampleError, Rejection, Sample, Source
from omnivl.data.sources.generated import GENERATED
from omnivl.errors import DataError

Media = Literal["image", "video"]

Reads = Literal["caption", "label", "media"]
"""What samples must have beside a picture or clip: a caption, a class, or nothing."""

_KINDS: Mapping[tuple[Media, Reads], DataKind] = {
    ("image", "caption"): "image_text",
    ("image", "label"): "image_label",
    ("image", "media"): "image",
    ("video", "caption"): "video_text",
    ("video", "label"): "video_label",
    ("video", "media"): "video",
}
EVALUATION_SEED = 0
"""Seed of generated sources. Their ``part`` separates evaluation and training clips, so that a plan may have the same
seed."""


def evaluation_entry(
    source: str, media: Media, where: Mapping[str, tuple[str, ...]], reads: Reads, pictures: tuple[str, ...] = ()
) -> DataEntryConfig:
    """What an evaluation reads of a source, as a data entry; arguments as those of ``PictureSet``."""
    if pictures:
        return DataEntryConfig(source=source, kind="images_text", where=where, pictures=pictures)
    kind = _KINDS[media, reads]
    made = GENERATED.get(source)
    if made is not None and kind not in made:  # what it makes has more than the evaluation reads
        kind = next((one for one in made if is_video(one) == is_video(kind)), kind)
    return DataEntryConfig(source=source, kind=kind, where=where)


class _Listed:
    """Samples in memory as a ``Source``."""

    classes: tuple[str, ...] = ()
    rejections: Sequence[Rejection] = ()

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> Sample:
        """See ``Source``."""
        return self._samples[index]


class PictureSet:
    """Pictures or clips with the texts and classes that they have.

    Attributes:
        media: ``image`` or ``video``.
        samples: All samples, in the source's order, thinned evenly to ``max_samples``.
    """

    def __init__(
        self,
        source: str,
        media: Media,
        where: Mapping[str, tuple[str, ...]],
        sizes: InputSizes,
        max_samples: int,
        reads: Reads = "caption",
        opened: Source | None = None,
        pictures: tuple[str, ...] = (),
    ) -> None:
        """Reads the samples.

        Args:
            source: Data source.
            media: ``image`` or ``video``.
            where: Filter by metadata.
            sizes: Of the model's inputs.
            max_samples: Upper bound on the number of samples.
            reads: What samples must have; others are left out.
            opened: The source where it is open already.
            pictures: Files that are the pictures of a sample, which then is a set; none for samples of one picture.

        Raises:
            DataError: There is no such source, it has no such sample, or one of them is bad.
        """
        if opened is None:
            opened = open_source(
                evaluation_entry(source, media, where, reads, pictures),
                seed=EVALUATION_SEED,
                num_frames=sizes.num_frames,
                size=sizes.video_size,
            )
        count = min(len(opened), max_samples)
        self.media = media
        self.sizes, self.side = sizes, sizes.side(media == "video")
        self.num_frames = 1 if media == "image" else sizes.num_frames
        self._members = pictures
        self._shot = MIDDLE
        self.samples: list[Sample] = []
        try:
            for i in range(count):
                self.samples.append(opened.read(i * len(opened) // count))
        except BadSampleError as error:
            raise _bad(error) from error

    def seen(self, shot: Shot) -> Self:
        """The same samples, of which another part is looked at."""
        other = copy.copy(self)
        other._shot = shot
        return other

    @classmethod
    def of(cls, samples: Sequence[Sample], media: Media, sizes: InputSizes, pictures: tuple[str, ...] = ()) -> Self:
        """A set of samples that a program has, all of them.

        Args:
            samples: With pictures or clips.
            media: ``image`` or ``video``.
            sizes: Of the model's inputs.
            pictures: Files that are the pictures of a sample; see above.
        """
        return cls("", media, {}, sizes, len(samples), "media", _Listed(samples), pictures)

    def __len__(self) -> int:
        return len(self.samples)

    def chosen(self, indices: Sequence[int]) -> Self:
        """A set of some of the samples, in any order; a sample may be in it more than once."""
        some = copy.copy(self)
        some.samples = [self.samples[i] for i in indices]
        return some

    def by_caption(self) -> Self:
        """The same samples, each as often as it has captions, one at a time; one without any once."""
        some = copy.copy(self)
        some.samples = []
        for sample in self.samples:
            each = [replace(sample, captions=(caption,)) for caption in sample.captions]
            some.samples += each or [sample]
        return some

    @property
    def captions(self) -> list[str]:
        """The first caption of each sample.

        Raises:
            DataError: A sample has none.
        """
        return [captions[0] for captions in self.all_captions]

    @property
    def all_captions(self) -> list[tuple[str, ...]]:
        """The captions of each sample, at least one.

        Raises:
            DataError: A sample has none.
        """
        for sample in self.samples:
            if not sample.captions:
                raise DataError(f"{sample.where} has no caption, which this task needs; filter it out with `where`")
        return [tuple(sample.captions) for sample in self.samples]

    def frames(self, indices: Sequence[int], size: int | None = None) -> Tensor:
        """Decoded pictures as squares, uint8 ``[len(indices), T, 3, size, size]``; None: of the model's side.

        T is the number of frames of a clip, or of pictures of a set.
        """
        return torch.stack(self._views(indices, size or self.side))

    def shown(self, indices: Sequence[int], device: str | None = None) -> Tensor | Pictures:
        """Decoded pictures as the model sees them: ``frames``, or with their own sizes.

        Args:
            indices: Which ones.
            device: The GPU that decodes them; None for the CPU.
        """
        moves = self.media == "video"
        if not self.sizes.native:
            frames = torch.stack(self._views(indices, self.sizes.size_of_view(moves), device))
            return Pictures(frames, are_sets=True) if self._members else frames
        size = self.sizes.size_of_view(moves)
        views = [one.permute(0, 2, 3, 1).numpy() for one in self._views(indices, size, device)]
        return Pictures(*in_strips(views, self.sizes.patch_size), are_sets=bool(self._members))

    def rejections(self) -> list[Rejection | None]:
        """Why each sample cannot be decoded; None for those that can."""
        size = self.sizes.size_of_view(self.media == "video")
        found: list[Rejection | None] = []
        for sample in self.samples:
            try:
                self._view(sample, size, None)
            except BadSampleError as error:
                found.append(error.rejection)
            else:
                found.append(None)
        return found

    def _views(self, indices: Sequence[int], size: SizeOf, device: str | None = None) -> list[Tensor]:
        try:
            return [self._view(self.samples[i], size, device) for i in indices]
        except BadSampleError as error:
            raise _bad(error) from error

    def _view(self, sample: Sample, size: SizeOf, device: str | None) -> Tensor:
        """The frames of a clip, a picture, or the pictures of a set: all squares, or all of the size of the first."""
        shown = [] if not self._members else members_as_samples(sample, self._members)
        if not shown:
            return evaluation_frames(sample, size, self.num_frames, LoaderConfig(), self._shot, device)
        lacking = next((name for name, one in zip(self._members, shown, strict=True) if one is None), None)
        if lacking is not None:
            raise BadSampleError("missing_media", sample.where, f"it has no file {lacking!r}")
        first, *others = [one for one in shown if one is not None]
        views = [evaluation_frames(first, size, 1, LoaderConfig(), device=device)]
        own = (views[0].shape[3], views[0].shape[2])
        of_others: SizeOf = size if isinstance(size, int) else lambda width, height: own
        views += [evaluation_frames(one, of_others, 1, LoaderConfig(), device=device) for one in others]
        return torch.cat(views)

    def view(self, index: int) -> Tensor:
        """One sample as the model sees it, uint8 ``[T, 3, h, w]``."""
        (view,) = self._views([index], self.sizes.size_of_view(self.media == "video"))
        return view

    def whole(self, index: int, side: int, most: int) -> list[Tensor]:
        """One sample as people see it: nothing is cut off, and the longer side of each picture has ``side`` pixels.

        Args:
            index: Which one.
            side: See above.
            most: Largest number of frames of a clip, evenly spread; a set has all of its pictures.

        Returns:
            uint8 ``[3, h, w]`` each.
        """
        sample, size = self.samples[index], partial(fitted, side=side)
        try:
            if self._members:
                members = [one for one in members_as_samples(sample, self._members) if one is not None]
                return [evaluation_frames(one, size, 1, LoaderConfig())[0] for one in members]
            return list(evaluation_frames(sample, size, min(most, self.num_frames), LoaderConfig(), self._shot))
        except BadSampleError as error:
            raise _bad(error) from error

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a sample's whole picture in pixels, upright.

        Raises:
            DataError: The picture says no size.
        """
        sample = self.samples[index]
        whole = still_size(sample, lambda width, height: (width, height))
        if not isinstance(whole, tuple):
            raise _bad(BadSampleError("broken_image", sample.where, "its header says no size"))
        return whole

    def placement(self, index: int) -> Placement:
        """Where the points of a sample's picture are in the view that the model sees.

        Raises:
            DataError: The picture says no size.
        """
        return evaluation_placement(*self.size(index), self.sizes.size_of_view(self.media == "video"))

    def thumbnail(self, index: int, size: int = 80) -> str:
        """A small picture as a PNG data URI; of a clip, its middle frame; of a set, all pictures side by side."""
        frames = self.frames([index], size)[0]
        chosen = torch.cat(list(frames), dim=2) if self._members else frames[len(frames) // 2]
        return as_png(chosen)


def as_png(picture: Tensor) -> str:
    """A picture, uint8 ``[3, H, W]`` on the CPU, as a PNG data URI."""
    written, png = cv2.imencode(".png", np.ascontiguousarray(picture.permute(1, 2, 0).numpy()[..., ::-1]))
    assert written
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """The (width, height) of a picture whose longer side is scaled to ``side`` pixels."""
    longer = max(width, height)
    return max(1, round(side * width / longer)), max(1, round(side * height / longer))


def shared_batches(count: int, batch_size: int, gather: Gather) -> Iterator[list[int]]:
    """This replica's part of ``range(count)``, batch by batch.

    Every replica gets the same number of equally sized batches (layers of a sharded model must be called in step), the
    last index is repeated if there are too few. Joined in replica order and cut to ``count``, results are in order.
    """
    per_replica = -(-count // gather.replicas)
    first = gather.replica * per_replica
    for start in range(first, first + per_replica, batch_size):
        stop = min(start + batch_size, first + per_replica)
        yield [min(i, count - 1) for i in range(start, stop)]


def _bad(error: BadSampleError) -> DataError:
    return DataError(f"evaluation needs every sample, but {error}: mend it or filter it out with `where`")
