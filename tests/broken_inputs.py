"""Files of a plan that are there, and that are not or are of another kind; and plans that name them."""

import gzip
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tar_files import write_tar

ROOT = Path(__file__).parents[1]
STAGES = ("first", "second", "third")

Broken = Callable[[dict[str, Any], Path], None]
"""Changes a stage of a plan, whose files are in a folder."""


def picture(number: int, form: str = "PNG") -> bytes:
    """A picture of one colour; as a GIF one of two frames."""
    frames = [Image.new("RGB", (40, 40), (20 * number, 255 - 20 * number, shade)) for shade in (0, 200)]
    content = io.BytesIO()
    frames[0].save(content, form, **({"save_all": True, "append_images": frames[1:]} if form == "GIF" else {}))
    return content.getvalue()


def write_samples(path: Path, samples: list[dict[str, bytes]]) -> None:
    """Writes a tar file of samples, each given by the contents of its files by extension."""
    named = enumerate(samples)
    write_tar(path, {f"{number:03d}.{extension}": data for number, one in named for extension, data in one.items()})


def described(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def write_files(folder: Path) -> None:
    """Shards, weights and tokenizers, good and bad."""
    good = [
        {"png": picture(n), "json": described(caption=f"colour {n}", label=f"hue {n % 2}", split="train")}
        for n in range(8)
    ]
    for number in (0, 1, 2, 4):
        write_samples(folder / f"good-{number:03d}.tar", good)
    write_samples(folder / "clips.tar", [{"gif": picture(n, "GIF"), "txt": b"a clip"} for n in range(4)])
    write_samples(folder / "captions.tar", [{"png": picture(n), "txt": b"a colour"} for n in range(4)])
    write_samples(folder / "french.tar", [{"png": picture(1), "json": described(captions={"fr": "une couleur"})}])
    write_samples(folder / "labels.tar", [{"png": picture(n), "cls": b"hue"} for n in range(4)])
    write_samples(folder / "silent.tar", [*good, *({"png": picture(n)} for n in range(8))])
    write_samples(folder / "garbled.tar", [{"png": picture(n)[:60], "txt": b"a colour"} for n in range(12)])
    (folder / "empty.tar").write_bytes(b"")
    (folder / "text.tar").write_text("no archive\n" * 200)
    (folder / "packed.tar").write_bytes(gzip.compress((folder / "captions.tar").read_bytes()))
    (folder / "cut.tar").write_bytes((folder / "captions.tar").read_bytes()[:700])
    os.mkfifo(folder / "pipe.tar")
    (folder / "nothing").mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(picture(1))
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 24)}, folder / "alien.safetensors")
    (folder / "garbage.safetensors").write_bytes(b"\x01" * 400)
    whole = (folder / "alien.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[: len(whole) - 16])
    (folder / "hollow").mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n[DEC]\nof\n")
    (folder / "headless.txt").write_text("only\nwords\n")


def plan_of(folder: Path, **fields: Any) -> dict[str, Any]:
    """A right plan of three stages that names the good files."""
    stage: Mapping[str, Any] = {
        "steps": 3,
        "data": [{"source": f"{folder}/good-{{000..002}}.tar", "kind": "image_text", "where": {"split": ["train"]}}],
        "objectives": ["univlc", "mlm"],
        "evaluate": {"tasks": [{"kind": "retrieval", "source": f"{folder}/good-000.tar"}]},
    }
    return {
        "name": "three",
        "tokenizer": str(folder / "vocab.txt"),
        "model": {"preset": str(ROOT / "configs" / "models" / "debug.yaml"), "vocab_size": 7},
        "parallel": {"host": "plain", "precision": "fp32"},
        "launch": {"processes": 1},
        "batch": {"micro_batch_size_per_gpu": 4},
        "loader": {"min_samples_to_judge": 1},
        "stages": [json.loads(json.dumps({"name": name, **stage})) for name in STAGES],
        **fields,
    }


def write_plan(folder: Path, content: Mapping[str, Any], name: str = "plan.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def source(name: str, **fields: Any) -> Broken:
    """Another source of training, with other fields."""

    def change(stage: dict[str, Any], folder: Path) -> None:
        stage["data"] = [{"source": name.replace("HERE", str(folder)), "kind": "image_text", **fields}]
        if fields.get("kind") == "image_label":
            stage["objectives"] = ["univlc"]

    return change


def task(name: str, kind: str = "retrieval", **fields: Any) -> Broken:
    """Another task, of another source."""

    def change(stage: dict[str, Any], folder: Path) -> None:
        here = json.loads(json.dumps(fields).replace("HERE", str(folder)))
        stage["evaluate"]["tasks"] = [{"kind": kind, "source": name.replace("HERE", str(folder)), **here}]

    return change


def weights(part: str, name: str) -> Broken:
    """Starting weights."""

    def change(stage: dict[str, Any], folder: Path) -> None:
        stage["weights"] = {part: str(folder / name)}

    return change


def asked(**fields: Any) -> Broken:
    """Good shards, of which something is asked that they do not have."""
    return source("HERE/good-000.tar", **fields)


BROKEN: Mapping[str, tuple[Broken, str, str]] = {
    "no such shard": (source("HERE/gone.tar"), "data.0.source", "No such file"),
    "no such folder": (source("HERE/gone"), "data.0.source", "No such file"),
    "folder without shards": (source("HERE/nothing"), "data.0.source", "holds no file that ends with .tar"),
    "folder of pictures": (source("HERE/pictures"), "data.0.source", "omnivl data convert folder"),
    "glob without a match": (source("HERE/gone-*.tar"), "data.0.source", "no shard matches"),
    "hole in a range": (source("HERE/good-{000..004}.tar"), "data.0.source", "1 of 5 shards cannot be read"),
    "range that is too long": (source("HERE/good-{001..011}.tar"), "data.0.source", "and 3 more"),
    "list with a wrong name": (source("HERE/{captions,capitals}.tar"), "data.0.source", "capitals.tar"),
    "list with a folder": (source("HERE/{captions.tar,nothing}"), "data.0.source", "nothing (a folder)"),
    "file without bytes": (source("HERE/empty.tar"), "data.0.source", "empty"),
    "pipe of the file system": (source("HERE/pipe.tar"), "data.0.source", "pipe.tar (no regular file)"),
    "text named tar": (source("HERE/text.tar"), "data.0.source", "none of its 1 shards can be read"),
    "gzip named tar": (source("HERE/packed.tar"), "data.0.source", "gzip"),
    "cut shard": (source("HERE/cut.tar"), "data.0.source", "cut.tar"),
    "address without a host": (source("http:///x.tar"), "data.0.source", "no host or bucket"),
    "address of another kind": (source("ftp://host/x.tar"), "data.0.source", "ftp"),
    "filter by an unknown field": (
        asked(where={"part": ["a"]}),
        "data.0.where",
        "part in ['a']",
    ),
    "filter by an unknown value": (asked(where={"split": ["test"]}), "data.0.where", "split in ['test']"),
    "filter of drawings": (source("emoji", where={"style": ["nowhere"]}), "data.0.where", "nowhere"),
    "filter of generated clips": (
        source("motion", kind="video_text", where={"style": ["nowhere"]}),
        "data.0.where",
        "nowhere",
    ),
    "clips of stills": (asked(kind="video_text"), "data.0.source", "no sample of kind video_text is left"),
    "stills of clips": (source("HERE/clips.tar"), "data.0.source", "0 stills and 4 clips"),
    "labels that are not there": (source("HERE/captions.tar", kind="image_label"), "data.0.source", "image_label"),
    "captions that are not there": (source("HERE/labels.tar"), "data.0.source", "image_text"),
    "another language": (source("HERE/french.tar"), "data.0.source", "no sample of kind image_text is left"),
    "text in a field of no sample": (asked(text="story"), "data.0", "story"),
    "pictures of no sample": (asked(pictures=["left.png"]), "data.0.pictures", "left.png"),
    "pictures that cannot be decoded": (source("HERE/garbled.tar"), "data.0", "none of 8 samples that were tried"),
    "too many bad samples": (source("HERE/silent.tar"), "data.0.source", "8 of 16 samples are bad"),
    "evaluation of no shard": (task("HERE/gone.tar"), "evaluate.tasks.0.source", "No such file"),
    "evaluation with a hole": (task("HERE/good-{000..004}.tar"), "evaluate.tasks.0.source", "good-003.tar"),
    "evaluation of a text": (task("HERE/text.tar"), "evaluate.tasks.0.source", "none of its 1 shards can be read"),
    "evaluation's filter": (
        task("HERE/good-000.tar", where={"split": ["test"]}),
        "evaluate.tasks.0.where",
        "split in ['test']",
    ),
    "evaluation's kind": (task("HERE/good-000.tar", media="video"), "evaluate.tasks.0.source", "video_text"),
    "evaluation's labels": (task("HERE/captions.tar", "zero_shot"), "evaluate.tasks.0.source", "image_label"),
    "evaluation's captions": (task("HERE/labels.tar"), "evaluate.tasks.0.source", "image_text"),
    "evaluation's tags": (task("HERE/good-000.tar", text="tags"), "evaluate.tasks.0", "no list 'tags'"),
    "evaluation's baseline": (
        task("HERE/good-000.tar", baseline={"source": "HERE/gone.tar"}),
        "evaluate.tasks.0.baseline.source",
        "No such file",
    ),
    "evaluation of a stream": (task("pipe:cat x.tar"), "evaluate.tasks.0.source", "a stream has no list of samples"),
    "no such weights": (weights("all", "gone"), "weights.all", "holds neither"),
    "folder without weights": (weights("vision", "hollow"), "weights.vision", "holds neither"),
    "weights of nothing known": (weights("all", "alien.safetensors"), "weights.all", "alien.safetensors"),
    "garbage for weights": (weights("text", "garbage.safetensors"), "weights.text", "not readable as weights"),
    "cut weights": (weights("all", "short.safetensors"), "weights.all", "not readable as weights"),
}
"""By what is wrong: the change of a stage, the field that the message has to name, and a part of the message."""
