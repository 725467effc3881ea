from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

MakeImage = Callable[..., bytes]
MakeVideo = Callable[..., bytes]


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """Writes a noise picture and returns its bytes."""

    def write(path: Path, width: int = 12, height: int = 10, seed: int = 0) -> bytes:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path.read_bytes()

    return write


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """Writes a clip whose frames get brighter and returns its bytes."""

    def write(path: Path, width: int = 32, height: int = 16, frames: int = 4) -> bytes:
        path.parent.mkdir(parents=True, exist_ok=True)
        codec = {".webm": "libvpx", ".mp4": "libx264"}[path.suffix]
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(frames):
                pixels = np.full((height, width, 3), 40 * number, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        return path.read_bytes()

    return write
