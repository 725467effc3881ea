"""Configuration of data: one entry of a stage's mixture, and the loader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from moe.ranges import Range
from omnivl.data.batch import DataKind, has_visual, is_video
from omnivl.data.formats import STILL_EXTENSIONS

CaptionPolicy = Literal["first", "random", "join"]
FrameSampling = Literal["uniform", "segment"]
Fill = Literal["edge", "white"]
StartMethod = Literal["fork", "forkserver", "spawn"]
Decoder = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. The same draw is applied to all frames of a clip.

    Attributes:
        crop_scale: Area of the random crop over the area of the picture, (smallest, largest). (1, 1) with crop_ratio
            (1, 1) crops nothing but what makes the picture square.
        crop_ratio: Width over height of the random crop, (smallest, largest), drawn on a logarithmic scale.
        keep: Field of the entry with a box, or boxes, that the crop shows as a whole, e.g. ``box``: each of its borders
            is drawn between the picture's and the box's, as in X-VLM's grounding; ``crop_scale`` and ``crop_ratio``
            then count for samples without a box. Null for none.
        rotate: Largest rotation of the crop about its middle, in degrees, either way; 0 for none.
        zoom: Factor by which the crop is enlarged about its middle, (smallest, largest), drawn on a logarithmic scale.
            Below 1 the view shows what lies around the crop.
        fill: Pixels beyond the picture's border, where ``rotate`` or ``zoom`` show them: the border's colours continued
            (``edge``), or white.
        flip: Probability of a horizontal flip. Texts with a direction (left, right, ...) are never flipped.
        brightness: Largest relative change of brightness; 0 for none.
        contrast: Largest relative change of contrast; 0 for none.
        saturation: Largest relative change of saturation; 0 for none.
        hue: Largest rotation of the hue, in turns; 0 for none, at most 0.5.
        color_probability: Probability that brightness, contrast, saturation and hue change at all.
        grayscale: Probability of dropping all colour.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its deviation in pixels of the view, (smallest, largest).
        rand_augment_operations: Number of operations drawn from the RandAugment-style set; 0 for none.
        rand_augment_magnitude: Strength of these operations, from 0 to 10.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    keep: str | None = None
    rotate: Annotated[float, Range(0, 180)] = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    fill: Fill = "edge"
    flip: Annotated[float, Range(0, 1)] = 0.5
    brightness: Annotated[float, Range(0)] = 0.0
    contrast: Annotated[float, Range(0)] = 0.0
    saturation: Annotated[float, Range(0)] = 0.0
    hue: Annotated[float, Range(0, 0.5)] = 0.0
    color_probability: Annotated[float, Range(0, 1)] = 0.8
    grayscale: Annotated[float, Range(0, 1)] = 0.0
    blur: Annotated[float, Range(0, 1)] = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    rand_augment_operations: Annotated[int, Range(0)] = 0
    rand_augment_magnitude: Annotated[float, Range(0, 10)] = 5.0


@dataclass(frozen=True)
class FrameSamplingConfig:
    """Which frames of a clip become the model's ``num_frames``.

    Attributes:
        mode: ``uniform`` takes the middle of ``num_frames`` equal segments; ``segment`` draws one frame at random from
            each segment. Evaluation always takes ``uniform``.
        span: Share of the clip that is used, above 0 and at most 1: training draws where it starts, evaluation takes
            the middle.
    """

    mode: FrameSampling = "segment"
    span: Annotated[float, Range(above=0, high=1)] = 1.0


@dataclass(frozen=True)
class DataEntryConfig:
    """One entry of a stage's mixture: the source of samples and how they are processed.

    Attributes:
        source: ``emoji`` (embedded drawings and clips), ``emoji_hands`` (these, and the drawings of five further
            hands), ``motion`` (generated clips), ``questions`` (generated questions about the drawings), ``scenes``
            (generated scenes of several drawings, with samples for many tasks), or tar shards: a path, a folder, a glob
            (``data/*.tar``) or a brace pattern (``data/{000..127}.tar``). ``pipe:COMMAND`` and URLs are read as
            streams, which resume by shard instead of by sample.
        kind: Parts of a sample: an image or a clip, with a caption or with a class label; a text, an image or a clip
            alone; or several images with a text.
        weight: Share of micro-batches, relative to the other entries of the stage.
        name: Name in logs and part of every random key; made from kind and source if not given.
        where: Keeps the samples whose metadata field has one of the listed values, e.g. ``{split: [train]}``; numbers
            may be compared: ``{width: [">= 256"], similarity: [">= 0.3 < 0.9"], year: [2019, 2020]}``.
        text: Field of the samples' JSON that is their text, e.g. ``question``; null takes the captions.
        pictures: Files of a sample that are its pictures, named by the part after its key and a dot, e.g. ``[left.png,
            right.png]``; without an extension any format. Kind ``images_text`` needs them; for other kinds at most one
            is allowed, and by default the sample's picture or clip is used.
        least_pictures: How many of ``pictures`` a sample must have; missing ones are black; 0 for all.
        fields: Further fields of a sample that are kept: fields of its JSON, or files that are masks, by the name that
            an objective uses: ``{answers: answers, mask: mask.png}``, or a list if the names are the same.
        caption: Which of several captions or texts is used: the first, a random one, or all joined by commas in random
            order (in evaluation: in their own order).
        prompts: Texts that a class name is put into, at ``{label}``. Label kinds only.
        language: Language taken where a sample has captions in several languages.
        augment: Training augmentation of the pixels.
        views: Views of each picture or clip in training. With 2, momentum twins see a second one, drawn independently
            by the same ``augment``, as in TCL.
        frames: Choice of frames. Video kinds only.
    """

    source: str
    kind: DataKind
    weight: Annotated[float, Range(0)] = 1.0
    name: str | None = None
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text: str | None = None
    pictures: tuple[str, ...] = ()
    least_pictures: Annotated[int, Range(0)] = 0
    fields: Mapping[str, str] | tuple[str, ...] = ()
    caption: CaptionPolicy = "first"
    prompts: tuple[str, ...] = ("a picture of {label}",)
    language: str = "en"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    views: Annotated[int, Range(1, 2)] = 1
    frames: FrameSamplingConfig = field(default_factory=FrameSamplingConfig)

    @property
    def key(self) -> str:
        """Name in logs and random keys."""
        return f"{self.kind}:{self.source}" if self.name is None else self.name

    @property
    def kept_fields(self) -> Mapping[str, str]:
        """JSON field or file by the name of the field."""
        return self.fields if isinstance(self.fields, Mapping) else {name: name for name in self.fields}

    @property
    def field_files(self) -> tuple[str, ...]:
        """Those of ``fields`` that are files: their names have a picture's extension."""
        sources = self.kept_fields.values()
        return tuple(source for source in sources if source.rpartition(".")[2].lower() in STILL_EXTENSIONS)

    @property
    def num_pictures(self) -> int:
        """Number of pictures of a sample: of those named, else one; 0 for kinds without pictures."""
        return max(1, len(self.pictures)) if has_visual(self.kind) else 0

    @property
    def needed_pictures(self) -> int:
        """How many of ``pictures`` a sample must have."""
        return self.least_pictures or len(self.pictures)

    def num_frames(self, clip: int) -> int:
        """Frames of a sample, where a clip has ``clip``: as many as ``Batch.num_frames`` says."""
        return clip if is_video(self.kind) else self.num_pictures


def entry_keys(entries: Sequence[DataEntryConfig]) -> tuple[str, ...]:
    """A distinct name for each entry; equal names are numbered."""
    keys: list[str] = []
    for entry in entries:
        seen = sum(other.key == entry.key for other in entries[: len(keys)])
        keys.append(entry.key if seen == 0 else f"{entry.key}#{seen + 1}")
    return tuple(keys)


@dataclass(frozen=True)
class LoaderConfig:
    """How samples are read, decoded and kept ready.

    Attributes:
        num_workers: Worker processes per replica; 0 decodes in a background thread of the training process.
        prefetch_factor: Micro-batches that each worker (or the thread) keeps ready.
        start_method: How worker processes are started. ``fork`` is unsafe once the process runs threads of its own
            (gloo, CUDA).
        decode: What decodes JPEGs and videos: the CPU, or the process's GPU by TorchCodec (nvJPEG, NVDEC), which has to
            be installed. Pixels of both differ a little. It holds for a run's own evaluations too; ``omnivl evaluate``
            decodes on the CPU. A GPU that fails ends the run.
        max_bad_fraction: Share of bad samples above which the run stops.
        min_samples_to_judge: Number of samples from which on that share is checked.
        max_pixels: Pixels per picture or frame above which a sample is refused before it is decoded.
        max_frames: Frames per clip above which a sample is refused before it is decoded.
        cache_decoded: Keep decoded pictures in memory. For sets that fit, such as the embedded one.
        cache_mebibytes: Bound of that cache per process, in MiB.
        index_cache: Folder for shard indexes; null keeps each beside its shard if that folder is writable.
        shuffle_buffer: Samples that a stream shuffles among. Streams only.
        stream_timeout_seconds: How long a stream may send nothing before its shard is given up; a second such shard in
            a row ends the run. Streams only.
    """

    num_workers: Annotated[int, Range(0)] = 0
    prefetch_factor: Annotated[int, Range(1)] = 4
    start_method: StartMethod = "forkserver"
    decode: Decoder = "cpu"
    max_bad_fraction: Annotated[float, Range(0, 1)] = 0.01
    min_samples_to_judge: Annotated[int, Range(1)] = 200
    max_pixels: Annotated[int, Range(1)] = 40_000_000
    max_frames: Annotated[int, Range(1)] = 20_000
    cache_decoded: bool = True
    cache_mebibytes: Annotated[int, Range(0)] = 512
    index_cache: str | None = None
    shuffle_buffer: Annotated[int, Range(1)] = 1000
    stream_timeout_seconds: Annotated[float, Range(0.01, 86_400)] = 300.0
