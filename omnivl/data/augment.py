"""Training and evaluation views of a picture or clip.

Shapes: T frames, H x W pixels of the input, h x w pixels of the view. Pixels are uint8, RGB. All frames of a clip get
the same draw. Random numbers come from the sample's own generator, so that a view is a pure function of the sample's
position.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.config import AugmentConfig, Fill
from omnivl.data.placement import Matrix, Placement, crop_placement, mirror, pixel_map
from omnivl.data.rand_augment import apply_random_operations
from omnivl.data.sizes import Size, SizeOf

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""

_CROP_DRAWS = 10

_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True)
class View:
    """A view of a picture or clip.

    Attributes:
        pixels: ``[T, h, w, 3]``.
        place: Maps points of the picture to points of the view.
    """

    pixels: Pixels
    place: Placement


class TrainingDraw:
    """What the training view of one picture or clip draws: known before it is decoded, so that it need not be in full.

    The view is a random crop, rotated and zoomed, flipped, with changed colours, blur and RandAugment-style operations.
    """

    def __init__(
        self,
        config: AugmentConfig,
        random: np.random.Generator,
        *,
        flip_allowed: bool,
        kept: NDArray[np.float64] | None = None,
        stretched: bool = False,
    ) -> None:
        """Draws all but blur and the operations, whose number of draws depends on them.

        Args:
            config: Kinds and ranges of the changes.
            random: The sample's generator. It must not be used for anything else before ``view`` is called.
            flip_allowed: Whether the text stays true in a mirror.
            kept: Boxes ``[N, 4]`` that the crop shows as a whole: left, top, right, bottom as fractions. None: the crop
                is one of the configured area and ratio.
            stretched: Whether views of whole pictures are squares, so that ratios of crops are those of their pixels
                and not relative to the picture's.
        """
        self._config, self._random, self._flip_allowed = config, random, flip_allowed
        self._kept, self._stretched = kept, stretched
        self._uniforms = random.random(13)  # one call: the number of draws does not depend on the configuration
        self._box: tuple[Size, tuple[int, int], Box] | None = None

    def reduction(self, width: int, height: int, size: Size) -> float:
        """By what both sides of a picture may be divided without the view being enlarged.

        Args:
            width: W.
            height: H.
            size: Of the view.
        """
        (_, _, wide, high), (across, down) = self._crop(width, height, size), _sides(size)
        return min(wide / across, high / down) / max(1.0, self._zoom)

    def view(self, pixels: Pixels, size: Size, shrink: int = 1, whole: tuple[int, int] | None = None) -> View:
        """The view. To be called once.

        Args:
            pixels: ``[T, H, W, 3]``.
            size: Of the view. One of whole pictures, with two sides, shows all of them where nothing is cropped.
            shrink: By what the sides have been divided already; see ``Header.shrink``.
            whole: (width, height) before that; None for those of ``pixels``.
        """
        config, uniforms = self._config, self._uniforms
        across, down = _sides(size)
        shape = pixels.shape[2], pixels.shape[1]
        whole = whole or shape
        box, extent = self._crop(*whole, size), (float(whole[0]), float(whole[1]))
        if shape != whole:  # some files can only be decoded in full
            box, extent = _shrunk(box, shrink, shape), (whole[0] / shrink, whole[1] / shrink)
        if config.rotate == 0 and config.zoom == (1, 1):
            left, top, width, height = box
            view = resize(pixels[:, top : top + height, left : left + width], across, down)
            place = crop_placement(left, top, width, height, extent)
        else:
            view, place = _turned(pixels, (across, down), box, config.fill, self._angle, self._zoom, extent)
        if self._flip_allowed and uniforms[4] < config.flip:
            view, place = _mirrored(view), place.then(mirror)
        gray = uniforms[5] < config.grayscale
        jitter = uniforms[6] < config.color_probability and (
            config.brightness > 0 or config.contrast > 0 or config.saturation > 0 or config.hue > 0
        )
        if gray or jitter:
            view = _change_colours(view, config, 2 * uniforms[7:11] - 1 if jitter else np.zeros(4), gray)
        if config.blur > 0:  # drawn where it is asked for: other views are those of earlier versions
            drawn, sigma = self._random.random(2)
            if drawn < config.blur:
                view = _blurred(view, config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * sigma)
        if config.rand_augment_operations > 0:
            magnitude = config.rand_augment_magnitude / 10
            view, moved = apply_random_operations(view, config.rand_augment_operations, magnitude, self._random)
            place = place.then(*moved)
        return View(view, place)

    @property
    def _angle(self) -> float:
        """In radians."""
        return math.radians(self._config.rotate) * float(2 * self._uniforms[11] - 1)

    @property
    def _zoom(self) -> float:
        least, most = self._config.zoom
        return float(least * (most / least) ** self._uniforms[12])

    def _crop(self, width: int, height: int, size: Size) -> Box:
        """The part of a picture of W x H pixels that the view shows, before rotation and zoom."""
        if self._box is None or self._box[:2] != (size, (width, height)):
            if self._kept is not None:
                box = box_around(width, height, self._kept, self._uniforms[:4])
            elif not isinstance(size, int) and self._config.crop_scale == (1, 1):
                box = (0, 0, width, height)
            else:
                ratio = 1 if isinstance(size, int) or self._stretched else width / height
                box = crop_box(width, height, self._config, self._uniforms[:4], ratio)
            self._box = size, (width, height), box
        return self._box[2]


def training_view(
    pixels: Pixels,
    size: Size,
    config: AugmentConfig,
    random: np.random.Generator,
    *,
    flip_allowed: bool,
    kept: NDArray[np.float64] | None = None,
    stretched: bool = False,
) -> View:
    """The training view of pictures that have been decoded in full; see ``TrainingDraw``."""
    draw = TrainingDraw(config, random, flip_allowed=flip_allowed, kept=kept, stretched=stretched)
    return draw.view(pixels, size)


def _shrunk(box: Box, shrink: int, shape: tuple[int, int]) -> Box:
    """The whole pixels that hold a box, of a picture of ``shape`` whose sides have been divided by ``shrink``."""
    left, top, width, height = box
    right, bottom = min(-(-(left + width) // shrink), shape[0]), min(-(-(top + height) // shrink), shape[1])
    return left // shrink, top // shrink, right - left // shrink, bottom - top // shrink


def evaluation_view(pixels: Pixels, size: Size, along: float = 0.5) -> View:
    """The whole picture, or of one that is to be a square a part, resized.

    Args:
        pixels: ``[T, H, W, 3]``.
        size: Of the view in pixels.
        along: Where the square lies along the longer side, from 0 to 1: the middle by default.
    """
    height, width = pixels.shape[1:3]
    place = evaluation_placement(width, height, size, along)
    if not isinstance(size, int):
        return View(resize(pixels, *size), place)
    side = min(height, width)
    top, left = int((height - side) * along), int((width - side) * along)
    return View(resize(pixels[:, top : top + side, left : left + side], size, size), place)


def evaluation_reduction(width: int, height: int, size: Size) -> float:
    """By what both sides of a picture may be divided without its ``evaluation_view`` being enlarged."""
    across, down = _sides(size)
    return min(width, height) / size if isinstance(size, int) else min(width / across, height / down)


def evaluation_placement(width: int, height: int, size: Size | SizeOf, along: float = 0.5) -> Placement:
    """Where the points of a picture of some size are in its ``evaluation_view``."""
    if not isinstance(size, int):
        return crop_placement(0, 0, width, height, (width, height))
    side = min(height, width)
    return crop_placement(int((width - side) * along), int((height - side) * along), side, side, (width, height))


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def crop_box(
    width: int, height: int, config: AugmentConfig, uniforms: NDArray[np.float64], own_ratio: float = 1.0
) -> Box:
    """A random box (left, top, width, height) of the configured area and ratio.

    A box that does not fit into the picture is drawn again, ten times at most; then it is the largest one in the middle
    whose ratio is allowed. Further draws come from a generator that the four numbers determine, so that what a sample
    draws afterwards does not depend on how often a box was drawn.

    Args:
        width: W.
        height: H.
        config: Ranges of area and ratio.
        uniforms: Four numbers in [0, 1): area, ratio, horizontal and vertical place.
        own_ratio: Width over height that the configured ratios are relative to.

    Source: ``RandomResizedCrop`` of torchvision, whose distribution this is.
    """
    low, high = config.crop_scale
    least, most = own_ratio * config.crop_ratio[0], own_ratio * config.crop_ratio[1]
    again: np.random.Generator | None = None
    *draw, across, down = uniforms.tolist()
    for _ in range(_CROP_DRAWS):
        area = (low + (high - low) * draw[0]) * width * height
        ratio = least * (most / least) ** draw[1]
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(across * (width - box_width + 1))
            top = int(down * (height - box_height + 1))
            return left, top, box_width, box_height
        again = again or np.random.default_rng(np.asarray(uniforms, dtype=np.float64).view(np.uint64))
        draw = again.random(2).tolist()
    box_width = min(width, max(1, round(height * most)))
    box_height = min(height, max(1, round(width / least)))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def box_around(width: int, height: int, kept: NDArray[np.float64], uniforms: NDArray[np.float64]) -> Box:
    """A random box (left, top, width, height) that holds others: each border lies anywhere between theirs and its own.

    Args:
        width: W.
        height: H.
        kept: Boxes ``[N, 4]`` as fractions.
        uniforms: Four numbers in [0, 1): left, top, right, bottom.

    Source: Zeng et al., X-VLM, arXiv 2111.08276: its released code for RefCOCO+, ``grounding_dataset_bbox``.
    """
    inner_left, inner_top = (int(kept[:, axis].min() * side) for axis, side in ((0, width), (1, height)))
    inner_right, inner_bottom = (math.ceil(kept[:, axis].max() * side) for axis, side in ((2, width), (3, height)))
    left, top = int(uniforms[0] * (inner_left + 1)), int(uniforms[1] * (inner_top + 1))
    right = inner_right + int(uniforms[2] * (width - inner_right + 1))
    bottom = inner_bottom + int(uniforms[3] * (height - inner_bottom + 1))
    return left, top, right - left, bottom - top


def _turned(
    pixels: Pixels,
    size: tuple[int, int],
    box: Box,
    fill: Fill,
    angle: float,
    zoom: float,
    whole: tuple[float, float],
) -> tuple[Pixels, Placement]:
    """A crop turned and zoomed about its middle, by one map between picture and view.

    Args:
        pixels: ``[T, H, W, 3]``.
        size: (width, height) of the view.
        box: Of the crop.
        fill: Pixels beyond the border.
        angle: In radians.
        zoom: Factor.
        whole: (width, height) of the picture in units of a pixel; of a shrunk one, the last pixels may jut out.
    """
    left, top, width, height = box
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    across, down = size
    # The angle is one of the view's pixels, which are no squares of the picture where the crop has another ratio.
    to_picture = np.array([[cosine, -sine], [sine, cosine]]) * np.array([[width / across], [height / down]])
    middle = np.array([(across - 1) / 2, (down - 1) / 2])
    shift = np.array([left + (width - 1) / 2, top + (height - 1) / 2]) - to_picture @ middle
    result = np.empty((len(pixels), down, across, 3), dtype=np.uint8)
    for frame, target in zip(pixels, result, strict=True):
        cv2.warpAffine(
            frame,
            np.column_stack([to_picture, shift]),
            size,
            dst=target,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE if fill == "edge" else cv2.BORDER_CONSTANT,
            borderValue=(255, 255, 255),
        )

    def to_view() -> Matrix:
        return np.linalg.inv(pixel_map(to_picture, shift, size, whole)).astype(np.float64)

    return result, Placement((to_view,))


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resizes all frames: averages where both sides shrink, else interpolates."""
    if pixels.shape[1:3] == (height, width):
        return np.ascontiguousarray(pixels)
    shrinks = pixels.shape[1] >= height and pixels.shape[2] >= width
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    result = np.empty((len(pixels), height, width, 3), dtype=np.uint8)
    for frame, target in zip(pixels, result, strict=True):
        cv2.resize(frame, (width, height), dst=target, interpolation=how)
    return result


def _mirrored(pixels: Pixels) -> Pixels:
    """All frames with left and right exchanged; several times as fast as a copy with a negative stride."""
    result = np.empty_like(pixels)
    for frame, target in zip(pixels, result, strict=True):
        cv2.flip(frame, 1, dst=target)
    return result


def _blurred(pixels: Pixels, sigma: float) -> Pixels:
    """All frames blurred by a Gaussian of this deviation in pixels."""
    result = np.empty_like(pixels)
    for frame, target in zip(pixels, result, strict=True):
        cv2.GaussianBlur(frame, (0, 0), sigma, dst=target)
    return result


def _change_colours(pixels: Pixels, config: AugmentConfig, strengths: NDArray[np.float64], gray: bool) -> Pixels:
    """Brightness, contrast, saturation, hue and grayscale as one affine map of the colours.

    Args:
        pixels: ``[T, H, W, 3]``.
        config: Largest changes.
        strengths: Four numbers in [-1, 1].
        gray: Drop all colour at the end.
    """
    brightness = 1 + config.brightness * strengths[0]
    contrast = 1 + config.contrast * strengths[1]
    saturation = 1 + config.saturation * strengths[2]
    angle = 2 * math.pi * config.hue * strengths[3]
    to_gray = np.tile(_LUMA, (3, 1))
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    matrix = (_FROM_YIQ @ turn @ _TO_YIQ) @ (saturation * np.eye(3) + (1 - saturation) * to_gray)
    if gray:
        matrix = to_gray @ matrix
    stacked = pixels.reshape(-1, pixels.shape[2], 3)
    mean = brightness * float(np.dot(cv2.mean(stacked)[:3], _LUMA)) if contrast != 1 else 0.0
    affine = np.empty((3, 4))
    affine[:, :3] = contrast * brightness * matrix
    affine[:, 3] = (1 - contrast) * mean  # grey maps to itself under hue and saturation, so the order does not matter
    return cv2.transform(stacked, affine).reshape(pixels.shape)  # type: ignore[no-any-return]
