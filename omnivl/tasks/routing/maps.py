"""Whole pictures and clips whose patches are coloured by their expert, and the patches that an expert takes.

Shapes: H, W pixels; R rows and C columns of patches.
"""

import base64
import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from moe.analysis import strongest
from omnivl.inference.pictures import PictureSet
from omnivl.tasks.results import Drawing

Pixels = NDArray[np.uint8]

NOBODY = -1
"""The expert of a patch that none took, where experts choose."""

_SAMPLES, _FRAMES, _SIDE = 6, 4, 168
_PATCHES, _WORDS, _CROP = 12, 16, 44
_SPOT = ("modality", "sample", "frame", "row", "column")
_GOLDEN = 0.618034


@dataclass(frozen=True)
class MappedSample:
    """A sample as it is, and by layer with its patches in the colours of their experts.

    Attributes:
        caption: What it is.
        whole: The sample; of a clip, some of its frames side by side.
        layers: The same by layer.
    """

    caption: str
    whole: Drawing
    layers: dict[str, Drawing]


@dataclass(frozen=True)
class Taken:
    """The tokens that one expert takes with the highest weight.

    Attributes:
        expert: Index of the expert.
        load: The expert's share of the layer's choices.
        patches: Crops.
        words: Words.
    """

    expert: int
    load: float
    patches: tuple[Drawing, ...]
    words: tuple[str, ...]


def expert_colour(expert: int) -> tuple[int, int, int]:
    """Red, green and blue of an expert: hues by the golden ratio, so that neighbours differ whatever the number."""
    red, green, blue = colorsys.hls_to_rgb((0.6 + expert * _GOLDEN) % 1.0, (0.45, 0.6)[expert // 8 % 2], 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


class Shots:
    """Frames of the samples of several sets, decoded once each while they are in use."""

    def __init__(self, sets: Sequence[PictureSet]) -> None:
        """Takes sets of different media."""
        self._sets: dict[str, PictureSet] = {one.media: one for one in sets}
        self._decoded = lru_cache(maxsize=64)(self._decode)

    def frames(self, media: str, sample: int) -> Pixels:
        """uint8 ``[T, H, W, 3]``."""
        return self._decoded(media, sample)

    def _decode(self, media: str, sample: int) -> Pixels:
        frames: Pixels = self._sets[media].frames([sample])[0].permute(0, 2, 3, 1).numpy()
        return frames


def mapped_samples(tokens: Any, pictures: PictureSet, shots: Shots, patch_size: int) -> Iterator[MappedSample]:
    """The first samples of a set evenly chosen, with the first expert of each patch in each layer that they pass."""
    media = pictures.media
    own = tokens[(tokens["modality"] == media) & (tokens["row"] >= 0) & (tokens["choice"] == 0)]
    count = min(_SAMPLES, len(pictures))
    for sample in (index * len(pictures) // count for index in range(count)):
        frames, rows = shots.frames(media, sample), own[own["sample"] == sample]
        times = sorted(rows["frame"].unique())
        times = [times[index * len(times) // min(len(times), _FRAMES)] for index in range(min(len(times), _FRAMES))]
        one = pictures.samples[sample]
        caption = one.label or (one.captions[0] if one.captions else one.key)
        layers = {}
        for layer in rows["layer"].cat.categories:
            part = rows[rows["layer"] == layer]
            if part.empty:
                continue
            grids = [expert_grid(part[part["frame"] == time], frames.shape[1:3], patch_size) for time in times]
            painted = [paint(frames[time], grid) for time, grid in zip(times, grids, strict=True)]
            said = "; ".join(" / ".join(" ".join(map(_expert_said, row)) for row in grid.tolist()) for grid in grids)
            layers[str(layer)] = Drawing(_picture(painted), f"{layer}, expert of each patch: {said}")
        yield MappedSample(str(caption), Drawing(_picture([frames[time] for time in times]), str(caption)), layers)


def _expert_said(expert: int) -> str:
    return "-" if expert == NOBODY else str(expert)


def expert_grid(patches: Any, size: tuple[int, int], patch_size: int) -> NDArray[np.int64]:
    """The expert of each patch of one frame, int64 ``[R, C]``; ``NOBODY`` where none took it.

    Args:
        patches: Rows of the frame's patches.
        size: H and W.
        patch_size: Side of a patch in pixels.
    """
    grid = np.full((size[0] // patch_size, size[1] // patch_size), NOBODY, dtype=np.int64)
    grid[patches["row"].to_numpy(), patches["column"].to_numpy()] = patches["expert"].to_numpy()
    return grid


def paint(picture: Pixels, grid: NDArray[np.int64]) -> Pixels:
    """A picture uint8 ``[H, W, 3]`` with half of each patch's colour that of its expert; grey where none took it."""
    height, width = picture.shape[:2]
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    colours = np.array([expert_colour(max(0, expert)) for expert in grid.ravel().tolist()], dtype=np.float64)
    large = np.kron(colours.reshape(*grid.shape, 3), np.ones((height // grid.shape[0], width // grid.shape[1], 1)))
    taken = np.kron(grid != NOBODY, np.ones((height // grid.shape[0], width // grid.shape[1]), dtype=bool))
    mixed = np.where(taken[..., None], 0.5 * picture + 0.5 * large, grey)
    return mixed.round().astype(np.uint8)


def painted_picture(frames: Sequence[Pixels], grids: Sequence[NDArray[np.int64]]) -> str:
    """Frames side by side in the colours of their patches' experts, as a data URI; see ``paint``."""
    return _picture([paint(frame, grid) for frame, grid in zip(frames, grids, strict=True)])


def taken_by_experts(tokens: Any, layer: str, shots: Shots, patch_size: int) -> Iterator[Taken]:
    """What each expert of a layer takes with the highest weight, the busiest expert first."""
    own = tokens[tokens["layer"] == layer]
    patches, words = own[own["row"] >= 0], own[own["word"].notna()]
    for expert, count in own["expert"].value_counts().items():
        spots = strongest(patches, layer, expert, _SPOT, _PATCHES)[list(_SPOT)].to_numpy().tolist()
        crops = tuple(Drawing(_crop(shots, spot, patch_size), f"patch of {spot[0]} {spot[1]}") for spot in spots)
        spoken = strongest(words, layer, expert, ["word"], _WORDS)["word"]
        yield Taken(int(expert), float(count / len(own)), crops, tuple(map(str, spoken)))


def _crop(shots: Shots, spot: Sequence[Any], patch_size: int) -> str:
    """The enlarged pixels of a patch; for a tubelet, of its first frame."""
    media, sample, frame, row, column = spot
    picture = shots.frames(media, sample)[frame]
    cut = picture[row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size]
    return _encoded(cv2.resize(cut, (_CROP, _CROP), interpolation=cv2.INTER_NEAREST))


def _picture(frames: Sequence[Pixels]) -> str:
    """Frames side by side, each at a size to look at."""
    scale = max(1, _SIDE // frames[0].shape[0])
    large = [cv2.resize(one, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) for one in frames]
    return _encoded(np.concatenate(large, axis=1))


def _encoded(picture: Any) -> str:
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    assert done, "OpenCV writes PNG"
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"
