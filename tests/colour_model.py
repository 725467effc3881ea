"""A model of colours for tests of the page: small, and right about what it says.

Pictures are embedded by the colours that they have, texts by the colours that they name, in one space. An expert is a
colour: it takes the patches that have it and the words that name it.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.api import Routing
from omnivl.api.routing import LayerRouting
from omnivl.errors import UserError
from omnivl.tasks.routing.maps import NOBODY

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 80, 220), "white": (255, 255, 255)}
_GRID = 4


class ColourModel:
    """See above.

    Attributes:
        calls: How many calls there were.
        at_once: The most calls that ran at the same time.
    """

    def __init__(self, *, writes: bool = True, embeds: bool = True, routes_words: bool = True) -> None:
        self.writes, self.embeds, self.routes_words = writes, embeds, routes_words
        self.calls = self.at_once = self._running = 0
        self._count = threading.Lock()

    def encode_image(self, images: Sequence[np.ndarray], batch_size: int = 32) -> Tensor:
        with self._counted():
            return _unit([_shares(image) for image in images])

    def encode_video(self, clips: Sequence[np.ndarray], batch_size: int = 32) -> Tensor:
        with self._counted():
            return _unit([np.mean([_shares(frame) for frame in clip], axis=0) for clip in clips])

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        if not self.embeds:
            raise UserError("encode_text: got a stage without trained embeddings; allowed is one that trains 'univlc'")
        with self._counted():
            named = [[float(colour in text.lower().split()) for colour in COLOURS] for text in texts]
            return _unit([np.array(one) if any(one) else np.full(len(COLOURS), 0.5) for one in named])

    def classify(
        self, pictures: Sequence[np.ndarray], labels: Sequence[str], *, media: str = "image"
    ) -> list[list[tuple[str, float]]]:
        shares = torch.softmax(20 * self._any(pictures, media) @ self.encode_text(labels).T, dim=1).tolist()
        return [sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]) for row in shares]

    def caption(self, pictures: Sequence[np.ndarray], *, media: str = "image") -> list[str]:
        if not self.writes:
            raise UserError(
                "caption: got a stage that writes no texts; allowed is one that trains 'lm'; choose another"
            )
        return [f"a {list(COLOURS)[place]} picture" for place in self._any(pictures, media).argmax(dim=1).tolist()]

    def routing(self, picture: np.ndarray | None = None, text: str | None = None, *, media: str = "image") -> Routing:
        if picture is None and not self.routes_words:
            raise UserError("routing: got a text alone, and no layer with experts reads texts; give a picture")
        if picture is None:
            words = tuple((text or "").split())
            layers = (LayerRouting("text_00", len(COLOURS), None, tuple(map(_named, words))),)
            return Routing(layers, words, None, None)
        frames = [picture] if media == "image" else list(picture)
        grids = torch.tensor(np.array([_grid(frame) for frame in frames]))
        layers = [LayerRouting(f"visual_0{n}", len(COLOURS), grids, ()) for n in range(2)]
        words = tuple((text or "").split())
        if words:
            layers.append(LayerRouting("generation_00", len(COLOURS), None, tuple(map(_named, words))))
        return Routing(tuple(layers), words, None, None)

    def _any(self, pictures: Sequence[np.ndarray], media: str) -> Tensor:
        return self.encode_image(pictures) if media == "image" else self.encode_video(pictures)

    def _counted(self) -> "_Counted":
        return _Counted(self)


class _Counted:
    def __init__(self, model: ColourModel) -> None:
        self._model = model

    def __enter__(self) -> None:
        with self._model._count:
            self._model.calls += 1
            self._model._running += 1
            self._model.at_once = max(self._model.at_once, self._model._running)

    def __exit__(self, *_: object) -> None:
        with self._model._count:
            self._model._running -= 1


def _nearest_colour(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest colour of each pixel."""
    far = pixels[..., None, :].astype(float) - np.array(list(COLOURS.values()), dtype=float)
    return (far**2).sum(-1).argmin(-1)


def _shares(pixels: np.ndarray) -> np.ndarray:
    """How much of each colour there is; white counts little, as it is what things are drawn on."""
    counts = np.bincount(_nearest_colour(pixels).ravel(), minlength=len(COLOURS)).astype(float)
    counts[-1] /= 100
    return counts + 1e-3


def _unit(rows: Sequence[np.ndarray]) -> Tensor:
    return F.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=-1)


def _named(word: str) -> int:
    return list(COLOURS).index(word.lower()) if word.lower() in COLOURS else NOBODY


def _grid(pixels: np.ndarray) -> np.ndarray:
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    rows = [np.array_split(row, _GRID, axis=1) for row in np.array_split(square, _GRID, axis=0)]
    means = np.array([[patch.reshape(-1, 3).mean(0) for patch in row] for row in rows])
    return _nearest_colour(means)
