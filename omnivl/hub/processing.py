"""Turns pictures, clips and texts into the tensors that the model reads, in the same way as evaluation.

But for models whose ``sizes`` are ``native``: these are evaluated on pictures of their own sizes, and here see the
centre square.

Shapes: B samples, T frames, S side of a view.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from omnivl.data.hugging_face_tokenizer import HuggingFaceTokenizer
from omnivl.data.sizes import SizeOf, stretched_to
from omnivl.inference.given import Clip, Picture, clip_view, each_clip, each_picture, picture_view


class OmniVLImageProcessor(BaseImageProcessor):
    """The view of evaluation: the shorter side resized, the centre cropped; for clips, evenly spaced frames.

    Of a stage whose ``sizes`` are ``stretched``, the whole picture resized to the square. One whose ``sizes`` are
    ``native`` is evaluated on pictures of their own sizes; this still crops the centre square.

    Pixels stay uint8. Files are decoded as in evaluation, JPEGs at a reduced size if that is large enough, so that the
    same file gives the same tensor to the last bit. Transparent parts become white.
    """

    model_input_names = ["pixel_values", "pixel_values_videos"]  # noqa: RUF012 - declared so by its base

    def __init__(
        self,
        image_size: int = 224,
        video_size: int = 112,
        num_frames: int = 32,
        stretched: bool = False,
        **kwargs: Any,
    ) -> None:
        """Sets the sizes.

        Args:
            image_size: S of images.
            video_size: S of frames.
            num_frames: T.
            stretched: Whether a view shows the whole picture or clip, whatever its ratio, and not its middle.
            kwargs: Further fields that ``transformers`` writes into its files.
        """
        super().__init__(**kwargs)
        self.image_size, self.video_size, self.num_frames = image_size, video_size, num_frames
        self.stretched = stretched

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
            size = self._size(self.image_size)
            views = [picture_view(one, size)[0] for one in each_picture(images)]
            data["pixel_values"] = torch.stack(views)
        if videos is not None:
            size = self._size(self.video_size)
            views = [clip_view(one, size, self.num_frames) for one in each_clip(videos)]
            data["pixel_values_videos"] = torch.stack(views)
        return BatchFeature(data)

    def _size(self, side: int) -> SizeOf:
        return stretched_to(side) if self.stretched else side


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
