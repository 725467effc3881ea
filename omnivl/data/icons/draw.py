"""Draws an icon as an opaque picture: one that has no colours of its own in seeded colours."""

import io
import random
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from PIL import Image

from omnivl.data.emoji.iconify import Icon, svg_of
from omnivl.data.emoji.render import draw
from omnivl.data.icons.settle import is_animated, settled
from omnivl.randomness import stable_hash

Cause = Literal["damaged", "outside_reference", "too_large", "undrawable", "blank", "crashed", "too_slow"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

LARGEST_BODY = 2_000_000
"""Characters of a body; the largest of the package have 0.9 million."""
LEAST_CONTRAST = 3.0
"""Ratio of luminances of the two colours of an icon, from 1 to 21. Source: WCAG 2.1, success criterion 1.4.11."""

_WHITE, _DARK = (255, 255, 255), (32, 36, 44)
_FAINT = 40  # mean distance from white, of 255, below which a coloured drawing gets a dark ground
_VISIBLE = 24  # of 255: the most distant pixel of a drawing that can be seen at all
_QUOTE = r"""(?:["']|&quot;|&apos;)?"""
_OUTSIDE = re.compile(
    rf"""(?:href|src)\s*=\s*["'](?!\s*["'#])|url\(\s*(?!{_QUOTE}\s*#)|@import""", re.IGNORECASE
)  # a reference to something else than a part of the drawing

Colour = tuple[int, int, int]


class UndrawableError(Exception):
    """An icon that gives no picture."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail


@dataclass(frozen=True)
class Drawn:
    """A picture of an icon.

    Attributes:
        webp: The encoded picture, without losses.
        colour: What ``currentColor`` was, as ``#rrggbb``; None for an icon in colours of its own.
        ground: What lies behind it, as ``#rrggbb``.
    """

    webp: bytes
    colour: str | None
    ground: str

    def fields(self) -> dict[str, object]:
        """The part of a sample's JSON that says how it was drawn."""
        seeded = {} if self.colour is None else {"colour": self.colour}
        return {"colours": "seeded" if seeded else "own", **seeded, "ground": self.ground}


def draw_icon(icon: Icon, size: int, *key: int | str) -> Drawn:
    """Draws an icon in the middle of a square.

    Args:
        icon: What to draw.
        size: Side in pixels.
        key: What the colours are a function of.

    Raises:
        UndrawableError: It refers to something outside of itself, is too large, or shows nothing.
    """
    if len(icon.body) > LARGEST_BODY:
        raise UndrawableError("too_large", f"{len(icon.body)} characters; allowed: {LARGEST_BODY}")
    outside = _OUTSIDE.search(icon.body)
    if outside is not None:
        raise UndrawableError("outside_reference", icon.body[outside.start() : outside.start() + 80])
    if is_animated(icon.body):
        icon = replace(icon, body=settled(icon.body))
    colours = seeded_colours(*key) if "currentColor" in icon.body else None
    picture = _rasterised(svg_of(icon, None if colours is None else hexadecimal(colours[0])), size)
    ground = ground_for(picture) if colours is None else colours[1]
    shown = Image.alpha_composite(Image.new("RGBA", picture.size, (*ground, 255)), picture).convert("RGB")
    if int(np.abs(np.asarray(shown, dtype=np.int16) - np.array(ground, dtype=np.int16)).max()) < _VISIBLE:
        raise UndrawableError("blank", "nothing of it can be seen")
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return Drawn(buffer.getvalue(), None if colours is None else hexadecimal(colours[0]), hexadecimal(ground))


def seeded_colours(*key: int | str) -> tuple[Colour, Colour]:
    """A colour and a ground that differ enough, a function of the key."""
    numbers = random.Random(stable_hash("icons", "colours", *key))
    while True:
        colour, ground = _drawn_from(numbers), _drawn_from(numbers)
        if contrast(colour, ground) >= LEAST_CONTRAST:
            return colour, ground


def _drawn_from(numbers: random.Random) -> Colour:
    red, green, blue = (int(256 * numbers.random()) for _ in range(3))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """Ratio of the luminances of two colours, the lighter over the darker.

    Source: WCAG 2.1, "contrast ratio" and "relative luminance".
    """
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def ground_for(picture: Image.Image) -> Colour:
    """White, or dark where a drawing would hardly be seen on white.

    Args:
        picture: RGBA.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    alpha = pixels[..., 3]
    if alpha.sum() == 0:
        return _WHITE
    distance = float(((255 - pixels[..., :3]).mean(axis=-1) * alpha).sum() / alpha.sum())
    return _DARK if distance < _FAINT else _WHITE


def hexadecimal(colour: Colour) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _luminance(colour: Colour) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in _unit(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _unit(colour: Colour) -> list[float]:
    return [value / 255 for value in colour]


def _rasterised(svg: bytes, size: int) -> Image.Image:
    try:
        return draw(svg, size)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise UndrawableError("undrawable", f"{type(error).__name__}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a renderer written in Rust says that it failed
            raise
        raise UndrawableError("undrawable", f"the renderer failed: {error}") from error
