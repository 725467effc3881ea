"""Shards of coloured pictures and clips, and a server of the page over them with the model of colours."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from colour_model import COLOURS, ColourModel
from PIL import Image, ImageDraw
from tar_files import write_tar

from launcher.serve.answers import About, Answers
from launcher.serve.gallery import open_gallery
from launcher.serve.index import open_index
from launcher.serve.server import PageServer
from omnivl.errors import UserError

NAMES = ("red", "green", "blue")


def picture(colour: str, size: tuple[int, int] = (48, 48), share: float = 1.0) -> Image.Image:
    """A colour on white, from the left on."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((0, 0, round(share * size[0]) - 1, size[1]), fill=COLOURS[colour])
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def gif(colours: Sequence[str], size: tuple[int, int] = (48, 48)) -> bytes:
    """A clip that takes the colours in turn."""
    frames = [picture(colour, size) for colour in colours]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def colours_shard(folder: Path, count: int = 4) -> Path:
    """Pictures of each colour, and a red and a blue clip, with captions and labels."""
    members = {}
    for number in range(count):
        for name in NAMES:
            key = f"{name}-{number}"
            members[f"{key}.png"] = png(picture(name, share=1 - 0.1 * number))
            members[f"{key}.json"] = json.dumps({"caption": f"{name} picture {number}", "label": name}).encode()
    for name in ("red", "blue"):
        members[f"clip-{name}.gif"] = gif([name, "white", name])
        members[f"clip-{name}.json"] = json.dumps({"caption": f"{name} clip", "label": name}).encode()
    return write_tar(folder / "colours.tar", members)


@contextmanager
def served(folder: Path, model: ColourModel, host: str = "127.0.0.1") -> Iterator[PageServer]:
    """A running server on a free port; ``log`` of it collects failures in ``failures``."""
    gallery = open_gallery(str(colours_shard(folder)), {}, ("image", "video"), 1000)
    try:
        index = open_index(model, gallery, "weights", lambda _: None)
    except UserError as error:
        index = str(error)
    failures: list[str] = []
    server = PageServer(host, 0, Answers(model, gallery, index, About("colours", "joint", 7)), failures.append)
    server.failures = failures
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
