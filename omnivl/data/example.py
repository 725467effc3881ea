"""Makes the example at a position of an entry's order: reads, decodes and augments it, and adds text and fields.

Shapes: T frames, P pictures of a set, h x w pixels of the view: of one side, or of the picture's own size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from omnivl.data.augment import TrainingDraw, View, evaluation_reduction, evaluation_view
from omnivl.data.balance import visual_work
from omnivl.data.batch import has_visual, is_label, is_video
from omnivl.data.config import DataEntryConfig
from omnivl.data.decode import Header, decode_clip, decode_shrunk, read_header, still_size
from omnivl.data.fields import Field, FieldReader, texts_in
from omnivl.data.formats import file_named, picture_format, picture_size
from omnivl.data.frames import sample_frames
from omnivl.data.limits import DecodeLimits
from omnivl.data.order import Order
from omnivl.data.placement import Placement
from omnivl.data.sizes import InputSizes, Size
from omnivl.data.sources.base import BadSampleError, Measured, Rejection, Sample, Source, naming
from omnivl.data.text import choose_text, may_flip, sample_identity
from omnivl.errors import DataError
from omnivl.randomness import Streams, stable_hash

MAX_SUBSTITUTES = 32
_MAX_CACHED_FRAMES = 16  # of a longer clip only the needed frames are decoded, every time


@dataclass(frozen=True)
class Example:
    """One finished sample.

    Attributes:
        pictures: uint8 ``[T, h, w, 3]``, of a set ``[P, h, w, 3]``; RGB. None where the kind shows nothing.
        text: Caption, prompt or the field that the entry names as the text; None if the kind has none.
        identity: UniVLC's y.
        label: Class index within the source, or -1.
        position: Place in the entry's endless order.
        where: ``SHARD:KEY`` of the sample.
        meta: The sample's metadata.
        fields: The fields that the entry keeps, by name; see ``FieldReader``.
        second_view: Of the shape of ``pictures``: another view of the same, in training where the entry has two.
    """

    pictures: NDArray[np.uint8] | None
    text: str | None
    identity: int
    label: int
    position: int
    where: str
    meta: Mapping[str, object]
    fields: Mapping[str, object] = field(default_factory=dict)
    second_view: NDArray[np.uint8] | None = None


class PixelCache:
    """Cache of one process for decoded pictures and short clips, for sources that fit as a whole."""

    def __init__(self, mebibytes: int) -> None:
        """Makes an empty cache of at most ``mebibytes`` MiB."""
        self._bound = mebibytes * 2**20
        self._used = 0
        self._pixels: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def get(self, where: str, shrink: int = 1) -> NDArray[np.uint8] | None:
        """The cached pixels of a sample, whose sides have been divided by ``shrink``."""
        return self._pixels.get((where, shrink))

    def fits(self, num_bytes: int, source_length: int) -> bool:
        """Whether a sample is kept: a source with this number of samples of this size fits into the bound.

        Keeping a small part of a large source would cost memory and save nothing.
        """
        return num_bytes * source_length <= self._bound and self._used + num_bytes <= self._bound

    def put(self, where: str, pixels: NDArray[np.uint8], source_length: int, shrink: int = 1) -> None:
        """Keeps ``pixels`` if they fit."""
        if self.fits(pixels.nbytes, source_length) and (where, shrink) not in self._pixels:
            self._used += pixels.nbytes
            self._pixels[where, shrink] = pixels


def _joined(views: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
    """Pictures as one array; a single one is not copied."""
    return (views[0] if len(views) == 1 else np.concatenate(views)) if views else None


def _check_characters(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can hold and no tokenizer takes.

    Raises:
        BadSampleError: ``invalid_utf8``.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{text[error.start]!a} at character {error.start} of a text is no character; mend the text"
        raise BadSampleError("invalid_utf8", where, detail) from error


def members_as_samples(sample: Sample, names: Sequence[str]) -> list[Sample | None]:
    """A sample for each of a sample's files, by their names; None for those that it lacks."""
    found: list[Sample | None] = []
    for wanted in names:
        name = file_named(wanted, sample.members)
        if name is None:
            found.append(None)
        else:
            where, extension = f"{sample.where}.{name}", name.rpartition(".")[2].lower()
            found.append(replace(sample, where=where, media=sample.members[name], extension=extension))
    return found


def label_number(label: str) -> int:
    """A class index for streams, whose classes are not known beforehand: a hash of the name."""
    return stable_hash("label", label) & 0x7FFFFFFF


class ExampleReader:
    """Makes the examples of one entry. A bad sample is replaced by another one, drawn with its position as the key."""

    def __init__(
        self,
        config: DataEntryConfig,
        source: Source | None,
        sizes: InputSizes,
        *,
        key: str,
        seed: int,
        limits: DecodeLimits,
        cache: PixelCache | None = None,
        training: bool = True,
        asked: Mapping[str, Field] | None = None,
        device: str | None = None,
    ) -> None:
        """Describes a reader.

        Args:
            config: The entry.
            source: Its samples; None for a stream, whose samples are handed to ``finish``.
            sizes: Picture size and number of frames.
            key: The entry's part in random keys.
            seed: The stage's seed.
            limits: Bounds of decoding.
            cache: Cache of decoded pixels.
            training: Random views and texts, shuffled order; else plain ones in the source's own order.
            asked: Types of the fields that objectives ask for.
            device: The GPU that decodes; None for the CPU.
        """
        self.config, self.key, self._device = config, key, device
        self._source = source
        self._seed, self._limits, self._cache, self._training = seed, limits, cache, training
        self._sizes, self._is_video = sizes, is_video(config.kind)
        self._size, self._side = sizes.size_of_view(self._is_video), sizes.side(self._is_video)
        self._num_frames = sizes.num_frames
        self._texts, self._frames = (Streams(seed, key, what) for what in ("text", "frames"))
        self._views = [Streams(seed, key, what) for what in ("augment", "augment/second")[: config.views]]
        self._draws_text = training and (is_label(config.kind) or config.caption != "first")
        self._fields = FieldReader(config, asked or {}, limits)
        self._length = 0 if source is None else len(source)
        self._order = None if source is None else Order(self._length, seed, key)
        self._classes: dict[str, int] | None = None
        if source is not None:
            self._classes = {name: number for number, name in enumerate(source.classes)}

    @property
    def field_types(self) -> Mapping[str, Field]:
        """Types of the fields that the examples have, by name."""
        return self._fields.types

    def index(self, position: int) -> int:
        """The source's sample at a position."""
        assert self._order is not None, "a stream has no positions"
        return self._order(position)[1] if self._training else position % self._length

    def visual_work(self, positions: Sequence[int]) -> NDArray[np.float64]:
        """What encoding the samples at some positions takes, ``[K]``; see ``omnivl.data.balance``."""
        indices, source = np.array([self.index(position) for position in positions], dtype=np.int64), self._source
        unknown = np.zeros((len(indices), 2), dtype=np.int64)
        pictures = source.picture_sizes(indices) if isinstance(source, Measured) else unknown
        return visual_work(self._sizes, self._is_video, pictures)

    def describe(self, position: int) -> str:
        """Names the sample at a position for messages; does not raise if it cannot be read."""
        index = self.index(position)
        try:
            where = "" if self._source is None else f" ({self._source.read(index).where})"
        except BadSampleError as error:
            where = f" ({error.rejection.where})"
        return f"sample {index} of data entry {self.key!r}{where}, at position {position}"

    def example(self, position: int, refused: Mapping[str, Rejection] | None = None) -> tuple[Example, list[Rejection]]:
        """The example at a position, and the bad samples that it replaces.

        Args:
            position: In the entry's endless order.
            refused: Samples that are known to be bad, by their ``where``.

        Raises:
            DataError: None of ``MAX_SUBSTITUTES`` draws is good.
        """
        assert self._source is not None, "a stream hands its samples to finish"
        rejections: list[Rejection] = []
        index, tried = self.index(position), set[int]()
        for attempt in range(MAX_SUBSTITUTES):
            if index not in tried:
                try:
                    sample = self._source.read(index)
                    if refused and sample.where in refused:
                        raise BadSampleError(*vars(refused[sample.where]).values())
                    return self.finish(sample, position), rejections
                except BadSampleError as error:
                    rejections.append(error.rejection)
                    tried.add(index)
            index = stable_hash(self._seed, self.key, "substitute", position, attempt) % self._length
        last = rejections[-1]
        raise DataError(
            f"data source {self.config.source!r}: no good sample among {len(rejections)} that were tried, the last one "
            f"{last.where}: {last.cause}: {last.detail}"
        )

    def finish(self, sample: Sample, position: int) -> Example:
        """Decodes and augments a sample; all random draws are keyed by ``position``.

        Raises:
            BadSampleError: It cannot be decoded, has no text, lacks a field, or anything else fails for it.
        """
        with naming("unusable", sample.where):
            return self._finished(sample, position)

    def _finished(self, sample: Sample, position: int) -> Example:
        config = self.config
        text = choose_text(sample, config, self._texts.at(position) if self._draws_text else None)
        found = self._fields.read(sample)
        texts = [*([] if text is None else [text]), *texts_in(found)]
        for one in texts:
            _check_characters(one, sample.where)
        flip = sample.meta.get("flip", True) is not False and all(may_flip(one, config.language) for one in texts)
        kept = None if config.augment.keep is None else found[config.augment.keep]
        shown = list(self._views_of(sample, position, flip, kept)) if has_visual(config.kind) else []
        views, *second = zip(*shown, strict=True) if shown else [()]
        return Example(
            pictures=_joined([view.pixels for view in views]),
            second_view=_joined([view.pixels for own in second for view in own]),
            text=text,
            identity=sample_identity(sample, config),
            label=self._label(sample.label),
            position=position,
            where=sample.where,
            meta=sample.meta,
            fields=self._fields.place(found, [view.place for view in views], self._side),
        )

    def _views_of(self, sample: Sample, position: int, flip: bool, kept: object = None) -> Iterator[tuple[View, ...]]:
        """A view of each picture, in training as many as the entry has; those of pictures that a set lacks are black.

        The draws of first views come from one generator, in order, and those of second views from another.

        A view of training shows the boxes that are ``kept``, if there are any, as a whole.

        Pictures of a set have one size, that of the first which is there.
        """
        randoms = [stream.at(position) for stream in self._views] if self._training else []
        every = members_as_samples(sample, self.config.pictures) if self.config.pictures else [sample]
        size = next((self._size_of(shown) for shown in every if shown is not None), self._side)
        for shown in every:
            if shown is None:
                width, height = size if isinstance(size, tuple) else (self._side, self._side)
                nothing = View(np.zeros((1, height, width, 3), dtype=np.uint8), Placement())
                yield (nothing,) * max(1, len(randoms))
                continue
            boxes = kept if isinstance(kept, np.ndarray) and len(kept) else None
            drawn = partial(TrainingDraw, flip_allowed=flip, kept=boxes, stretched=self._sizes.stretched)
            draws = [drawn(self.config.augment, random) for random in randoms]
            header, shrink = (None, 1) if self._is_video else self._shrink(shown, draws, size)
            pixels = self._clip(shown, position) if self._is_video else self._still(shown, header, shrink)
            if size is None:
                assert not isinstance(self._size, int), "only views of whole pictures depend on these"
                size = self._size(pixels.shape[2], pixels.shape[1])
            if not draws:
                yield (evaluation_view(pixels, size),)
            else:
                whole = None if header is None else header.shown
                yield tuple(draw.view(pixels, size, shrink, whole) for draw in draws)

    def _size_of(self, shown: Sample) -> Size | None:
        """The size of a picture's view, see ``still_size``; the picture's own is checked before.

        Raises:
            BadSampleError: ``too_many_pixels``.
        """
        if shown.media is not None and not isinstance(self._size, int):
            self._limits.check_size(picture_size(shown.media) or (0, 0), shown.where)
        return still_size(shown, self._size)

    def _shrink(self, sample: Sample, draws: Sequence[TrainingDraw], size: Size | None) -> tuple[Header | None, int]:
        """The header of a JPEG and by what its sides are divided when it is decoded; None and 1 of all else."""
        if sample.frames is not None or size is None or picture_format(sample.media or b"") != "jpeg":
            return None, 1
        header = read_header(sample, self._limits)
        if self._device is not None:
            return header, 1  # TorchCodec decodes in full
        if not draws:
            return header, header.shrink(partial(evaluation_reduction, size=size))
        return header, header.shrink(lambda width, height: min(one.reduction(width, height, size) for one in draws))

    def _still(self, sample: Sample, header: Header | None, shrink: int) -> NDArray[np.uint8]:
        """The decoded picture ``[1, H, W, 3]``."""
        if sample.frames is not None:
            return sample.frames[:1]
        kept = None if self._cache is None else self._cache.get(sample.where, shrink)
        if kept is None:
            header = header or read_header(sample, self._limits)
            kept = decode_shrunk(sample, header, self._limits, shrink, self._device)
            if self._cache is not None:
                self._cache.put(sample.where, kept, self._length, shrink)
        return kept

    def _clip(self, sample: Sample, position: int) -> NDArray[np.uint8]:
        """The clip's chosen frames ``[T, H, W, 3]``."""

        def choose(total: int) -> list[int]:
            random = self._frames.at(position) if self._training else None
            return sample_frames(total, self._num_frames, self.config.frames, random)

        cache = self._cache if sample.frames is None else None
        kept = None if cache is None else cache.get(sample.where)
        if kept is not None:
            return kept[choose(len(kept))]
        if cache is None:
            return decode_clip(sample, self._limits, choose, device=self._device)
        whole: list[bool] = []

        def fits(total: int, pixels: int) -> bool:
            whole.append(total <= _MAX_CACHED_FRAMES and cache.fits(3 * total * pixels, self._length))
            return whole[0]

        pixels = decode_clip(sample, self._limits, choose, fits, self._device)
        if not whole[0]:
            return pixels
        cache.put(sample.where, pixels, self._length)
        return pixels[choose(len(pixels))]

    def _label(self, label: str | None) -> int:
        if label is None:
            return -1
        return label_number(label) if self._classes is None else self._classes.get(label, -1)
