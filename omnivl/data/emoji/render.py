"""Renders drawings as small pictures with transparency.

Alpha is kept, so that generated clips can put a drawing on any background; readers show transparent pixels as white.
Flat vector drawings are smallest as lossless WebP, shaded ones as lossy WebP.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omnivl.data.emoji.packages import HANDS

WHITE = (255, 255, 255, 255)
QUALITY = 75
ALPHA_QUALITY = 40
_LOSSLESS_STYLES = frozenset({"twemoji", *HANDS})
_METHOD = 4  # 6 is a percent smaller and, for lossless alpha, fifty times slower


def draw(data: bytes, size: int) -> Image.Image:
    """Decodes or rasterises a drawing to RGBA ``size`` x ``size`` pixels; other shapes are padded, not distorted.

    Args:
        data: SVG, PNG or WebP.
        size: Side in pixels. Smaller pictures are enlarged (bicubic), larger ones reduced (Lanczos).
    """
    if data.lstrip()[:4] == b"<svg":
        import resvg_py  # only needed to build the set, so it is no dependency of the package

        # Without the machine's fonts, whose search takes twenty times as long as a drawing: drawings have no text.
        data = bytes(
            resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=size, height=size, skip_system_fonts=True)
        )
    with Image.open(io.BytesIO(data)) as picture:
        return fit(picture.convert("RGBA"), size)


def fit(picture: Image.Image, size: int) -> Image.Image:
    """Pads to a square with transparency and resizes to ``size`` x ``size``."""
    if picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    if picture.width == size:
        return picture
    kernel = Image.Resampling.LANCZOS if picture.width > size else Image.Resampling.BICUBIC
    return picture.resize((size, size), kernel)  # Pillow weighs colours by alpha here


def on_white(picture: Image.Image) -> NDArray[np.uint8]:
    """Composites RGBA on white: uint8 ``[H, W, 3]``."""
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture).convert("RGB"))


def encode_drawing(picture: Image.Image, style: str) -> bytes:
    """WebP with alpha: lossless for flat styles, lossy for shaded ones."""
    buffer = io.BytesIO()
    if style in _LOSSLESS_STYLES:
        picture.save(buffer, "WEBP", lossless=True, quality=100, method=_METHOD)
    else:
        picture.save(buffer, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=_METHOD)
    return buffer.getvalue()
