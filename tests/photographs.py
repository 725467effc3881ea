"""Photographs and clips as a new user has them: drawn here, stored as phones, COCO and Kinetics store them."""

import csv
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageOps

KINDS = {"ball": (200, 40, 40), "box": (40, 160, 60), "tent": (50, 80, 200)}
SKY, GROUND = (235, 240, 250), (60, 50, 40)
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By value of EXIF's orientation: how the sensor's picture differs from the upright one."""


def scene(kind: str, number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """An upright picture: the sky above, the ground below, a thing between."""
    width, height = size
    picture = Image.new("RGB", size, SKY)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, height * 2 // 3, width, height), fill=GROUND)
    left, top = 4 + 5 * number % (width // 2), height // 3
    place = (left, top, left + width // 3, top + height // 3)
    colour = KINDS[kind]
    if kind == "ball":
        draw.ellipse(place, fill=colour)
    elif kind == "box":
        draw.rectangle(place, fill=colour)
    else:
        draw.polygon([(place[0], place[3]), (place[2], place[3]), ((place[0] + place[2]) // 2, place[1])], fill=colour)
    return picture


def caption_of(kind: str, number: int) -> str:
    colour = ("red", "green", "blue")[list(KINDS).index(kind)]
    return f"a {colour} {kind} on the ground, number {number}"


def write_photos(folder: Path) -> None:
    """A folder per class; every photo is stored as the sensor had it, with EXIF's word on how to turn it."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(8):
            orientation = number + 1
            upright = scene(kind, number, (64, 48))
            stored = upright if orientation == 1 else upright.transpose(_STORED[orientation])
            exif = Image.Exif()
            exif[0x0112], exif[0x010F] = orientation, "A phone"
            path = folder / kind / f"IMG_{number:04d}.JPG"
            stored.save(path, quality=95, exif=exif)
            shown = np.asarray(ImageOps.exif_transpose(Image.open(path)), dtype=int)
            assert abs(shown - np.asarray(upright, dtype=int)).mean() < 8, "the tag turns the picture upright"
            path.with_suffix(".txt").write_text(caption_of(kind, number) + "\n", encoding="utf-8")


def write_list(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for number in range(9):
        kind = list(KINDS)[number % 3]
        scene(kind, number, (50, 60)).save(folder / f"{number} photo.png")
        rows.append(
            {"file": f"{number} photo.png", "title": f'{caption_of(kind, number)}, "by the sea"', "album": "2024"}
        )
    with (folder / "list.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_coco(folder: Path) -> None:
    (folder / "train2017").mkdir(parents=True)
    images, annotations = [], []
    for number in range(12):
        kind = list(KINDS)[number % 3]
        name = f"{number:012d}.jpg"
        scene(kind, number, (80, 60)).save(folder / "train2017" / name, quality=90)
        images.append({"id": number, "file_name": name, "width": 80, "height": 60})
        annotations += [
            {"id": 5 * number + one, "image_id": number, "caption": f"{caption_of(kind, number)}, seen {one} times"}
            for one in range(5)
        ]
    (folder / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def write_clips(folder: Path) -> None:
    """Cut clips as Kinetics has them: a name with start and end, a CSV with labels and no captions."""
    (folder / "clips").mkdir(parents=True)
    rows = []
    for number in range(9):
        kind = list(KINDS)[number % 3]
        with av.open(str(folder / "clips" / f"video{number}_000003_000004.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for time_of in range(8):
                frame = av.VideoFrame.from_image(scene(kind, number + time_of))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        split = "train" if number < 6 else "validate"
        rows.append([f"{kind} moving", f"video{number}", "3", "4", split])
    with (folder / "kinetics.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["label", "youtube_id", "time_start", "time_end", "split"], *rows])
