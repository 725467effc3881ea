"""Turns pictures, clips and texts into the tensors that the model reads, in the same way as evaluation.

Shapes: B samples, T frames, S side of a view.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from omnivl.data.augment import evaluation_view
from omnivl.data.config import FrameSamplingConfig, LoaderConfig
from omnivl.data.decode import Pixels, evaluation_frames
from omnivl.data.formats import picture_format
from omnivl.data.frames import sample_frames
from omnivl.data.hugging_face_tokenizer import HuggingFaceTokenizer
from omnivl.data.orientation import tagged_orientation, upright
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.transparency import on_white
from omnivl.errors import DataError

Picture = Image.Image | Pixels | Tensor | bytes | str | Path
"""A picture: decoded, in RGB, where PIL's is turned upright by its EXIF; or the content or the path of its file.

Tensors are uint8 ``[3, H, W]``, arrays uint8 ``[H, W, 3]``."""

Clip = Sequence[Image.Image | Pixels | Tensor] | Pixels | Tensor | bytes | str | Path
"""A clip: a sequence of frames; one array ``[T, H, W, 3]`` or tensor ``[T, 3, H, W]``; or its file."""


class OmniVLImageProcessor(BaseImageProcessor):
    """The view of evaluation: the shorter side resized, the centre cropped; for clips, evenly spaced frames.

    Pixels stay uint8. Files are decoded as in evaluation, JPEGs at a reduced size if that is large enough, so that the
    same file gives the same tensor to the last bit. Transparent parts become white.
    """

    model_input_names = ["pixel_values", "pixel_values_videos"]  # noqa: RUF012 - declared so by its base

    def __init__(self, image_size: int = 224, video_size: int = 112, num_frames: int = 32, **kwargs: Any) -> None:
        """Sets the sizes.

        Args:
            image_size: S of images.
            video_size: S of frames.
            num_frames: T.
            kwargs: Further fields that ``transformers`` writes into its files.
        """
        super().__init__(**kwargs)
        self.image_size, self.video_size, self.num_frames = image_size, video_size, num_frames

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """See ``preprocess``."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Picture | list[Picture] | None = None,
        videos: Clip | list[Clip] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes views.

        Args:
            images: One picture or several.
            videos: One clip or several; a list of frames is one clip, a list of such lists several.
            kwargs: Ignored, e.g. ``return_tensors``: tensors are always torch's.

        Returns:
            ``pixel_values`` uint8 ``[B, 3, S, S]`` of images, ``pixel_values_videos`` uint8 ``[B, T, 3, S, S]`` of
            clips.

        Raises:
            DataError: A file cannot be decoded, or pixels have another type or shape.
        """
        data: dict[str, Tensor] = {}
        if images is not None:
            data["pixel_values"] = torch.stack([self._picture(one) for one in _several(images)])
        if videos is not None:
            clips = [videos] if _is_frame(_several(videos)[0]) else _several(videos)
            data["pixel_values_videos"] = torch.stack([self._clip(one) for one in clips])
        return BatchFeature(data)

    def _picture(self, picture: Any) -> Tensor:
        if isinstance(picture, bytes | str | Path):
            return _decoded(picture, self.image_size, 1)[0]
        return _view(_pixels(picture)[None], self.image_size)[0]

    def _clip(self, clip: Any) -> Tensor:
        if isinstance(clip, bytes | str | Path):
            return _decoded(clip, self.video_size, self.num_frames)
        frames = [_pixels(frame) for frame in clip]
        chosen = sample_frames(len(frames), self.num_frames, FrameSamplingConfig(), None)
        return _view(np.stack([frames[number] for number in chosen]), self.video_size)


class OmniVLProcessor(ProcessorMixin):
    """An image processor and a tokenizer. Texts get special tokens and are cut as in training, not as by the tokenizer.

    Attributes:
        image_processor: Makes ``pixel_values`` and ``pixel_values_videos``.
        tokenizer: Turns texts into ids and back.
    """

    def __init__(self, image_processor: OmniVLImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs: Any):
        """Takes an image processor and a tokenizer."""
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]
        self._encoder = HuggingFaceTokenizer(tokenizer, "of the processor")

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Makes the inputs of the model.

        Args:
            images: As ``OmniVLImageProcessor.preprocess`` takes them.
            text: One text or several.
            videos: As ``OmniVLImageProcessor.preprocess`` takes them.
            kwargs: ``max_length``: positions per text, by default the model's; else ignored.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 ``[B, max_length]``, ``pixel_values``, ``pixel_values_videos``,
            as far as given.

        Raises:
            DataError: See ``OmniVLImageProcessor.preprocess``.
        """
        data = dict(self.image_processor.preprocess(images, videos))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            length = kwargs.get("max_length") or self.tokenizer.model_max_length
            token_ids = torch.from_numpy(self._encoder.encode(texts, length))
            data["input_ids"] = token_ids
            ends = (token_ids == self._encoder.special.sep).long()
            ends[:, 0] = 0  # start and end may be one token, end and padding as well
            data["attention_mask"] = (ends.cumsum(1) - ends == 0).long()
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def to_dict(self) -> dict[str, Any]:
        """Content of ``processor_config.json``."""
        return {name: value for name, value in super().to_dict().items() if name != "_encoder"}

    def batch_decode(self, ids: Any, **kwargs: Any) -> list[str]:
        """Texts of the ids ``[B, L]`` that ``OmniVLModel.generate`` returns."""
        return [self.decode(row) for row in ids]

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """The text of ids ``[L]`` up to the end token, without special tokens."""
        return self._encoder.decode([int(number) for number in ids])


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _is_frame(value: Any) -> bool:
    """Whether an element of a list is a frame, not a whole clip."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3)


def _decoded(file: bytes | str | Path, size: int, num_frames: int) -> Tensor:
    """The evaluation view of an encoded picture or clip, ``[num_frames, 3, size, size]``."""
    where = "bytes" if isinstance(file, bytes) else str(file)
    try:
        media = file if isinstance(file, bytes) else Path(file).read_bytes()
        extension = "mp4" if isinstance(file, bytes) else Path(file).suffix.lower().lstrip(".")
        if isinstance(file, bytes) and (found := picture_format(file)) is not None:
            extension = found
        return evaluation_frames(Sample(where, where, media, extension), size, num_frames, LoaderConfig())
    except (OSError, BadSampleError) as error:
        raise DataError(f"{where}: cannot be decoded ({error}); give a picture or clip of a known format") from error


def _pixels(picture: Any) -> Pixels:
    """``[H, W, 3]`` of a decoded picture.

    Raises:
        DataError: It is of another type or shape.
    """
    if isinstance(picture, Image.Image):
        if picture.has_transparency_data:
            stored: Pixels = on_white(np.asarray(picture.convert("RGBA")))
        else:
            stored = np.asarray(picture.convert("RGB"))
        turned: Pixels = upright(stored[None], tagged_orientation(picture))[0]
        return turned
    given: Any = picture.permute(1, 2, 0).numpy() if isinstance(picture, Tensor) and picture.dim() == 3 else picture
    if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
        shaped = isinstance(picture, np.ndarray | Tensor)
        what = f"{given.dtype} {list(picture.shape)}" if shaped else type(picture).__name__
        raise DataError(
            f"picture: got {what}; allowed are PIL images, uint8 arrays [H, W, 3], uint8 tensors [3, H, W], files and "
            "their bytes; convert it"
        )
    return np.ascontiguousarray(given)


def _view(pixels: Pixels, size: int) -> Tensor:
    """The evaluation view ``[T, 3, size, size]`` of ``[T, H, W, 3]``."""
    return torch.from_numpy(np.ascontiguousarray(evaluation_view(pixels, size).pixels.transpose(0, 3, 1, 2)))
