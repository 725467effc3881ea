"""Captions that a model writes and filters: what is kept, and the shards that are made of it."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from complete_run import write_complete_run
from tar_files import write_tar
from typer.testing import CliRunner

from launcher.cli import app
from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import open_source
from omnivl.errors import DataError, UserError
from omnivl.tasks import recaption
from omnivl.tasks.recaption import Captioner, Filter, Recaptioned

PLAN = """
name: both
tokenizer: emoji
model:
  kind: blip
  vision: {hidden_size: 16, num_heads: 2, layers: 1}
  text: {hidden_size: 16, num_heads: 2, layers: 1}
  image_size: 16
  patch_size: 8
  text_length: 8
  projection_size: 8
  momentum: null
stages:
  - name: pairs
    steps: 5
    data: [{source: emoji, kind: image_text}]
    objectives: [itc, vlm, lm]
    optimizer: {warmup_steps: 1}
"""
NAMES = {"a": ("red", "one red dot"), "b": ("blue",), "c": ()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures with two captions, one and none."""
    members: dict[str, bytes] = {}
    for place, (key, captions) in enumerate(NAMES.items()):
        picture = np.full((16, 16, 3), 80 * place, dtype=np.uint8)
        members[f"{key}.json"] = json.dumps({"captions": list(captions), "label": key, "split": "train"}).encode()
        members[f"{key}.png"] = cv2.imencode(".png", picture)[1].tobytes()
    return write_tar(tmp_path_factory.mktemp("data") / "some.tar", members)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_complete_run(tmp_path_factory.mktemp("runs") / "both", PLAN, stages=1, spread=5)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "100"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(io.BytesIO(tar.extractfile(member).read()))
    return found


class FakeEncoder:
    """Stands for a trained stage where writing and matching are replaced."""

    model = SimpleNamespace(inputs=None)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Captioner, Filter]:
    """Each caption written is ``written KEY``; the log odds of a text are its number of letters less 5."""

    def write(pictures: Any, *_: Any) -> list[str]:
        return [f"written {sample.key}" if sample.key != "b" else "blue" for sample in pictures]

    def match(encoder: Any, objective: str, pictures: Any, texts: list[str], shown: Any, said: Any) -> torch.Tensor:
        assert [pictures[place].key for place in shown.tolist()]
        return torch.tensor([float(len(texts[place]) - 5) for place in said.tolist()])

    monkeypatch.setattr(recaption, "write_captions", write)
    monkeypatch.setattr(recaption, "predict_pairs", match)
    monkeypatch.setattr(recaption.PictureSet, "of", classmethod(lambda cls, samples, media, sizes: samples))
    encoder: Any = FakeEncoder()
    return Captioner(encoder), Filter(encoder)


def test_captions_are_added_and_those_that_match_are_kept(shards: Path, parts: tuple[Captioner, Filter]) -> None:
    source = open_source(DataEntryConfig(source=str(shards), kind="image"), seed=0, num_frames=1, size=16)
    captioner, judge = parts
    both = list(Recaptioned(source, "image", captioner, judge).entries())
    # "red" and "blue" have log odds -2 and -1; what is written of b is what it has already.
    assert [getattr(one, "captions", None) for one in both] == [("one red dot", "written a"), None, ("written c",)]
    assert both[0].meta["written"] == "written a"
    assert (both[0].label, both[0].split, both[0].name) == ("a", "train", "a.png")
    assert both[1].cause == "missing_caption"
    assert both[1].detail == "no caption whose log odds of a match are 0 or more"
    writes = list(Recaptioned(source, "image", captioner, None).entries())
    assert [one.captions for one in writes] == [("red", "one red dot", "written a"), ("blue",), ("written c",)]
    assert "written" not in writes[1].meta
    filters = list(Recaptioned(source, "image", None, replace(judge, least=-1.5)).entries())
    assert [getattr(one, "captions", None) for one in filters] == [("one red dot",), ("blue",), None]


def test_what_cannot_be_decoded_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    picture = cv2.imencode(".png", np.zeros((16, 16, 3), dtype=np.uint8))[1].tobytes()
    members = {}
    for key, media in (("a", picture), ("b", picture[:40]), ("c", picture)):
        members |= {f"{key}.json": json.dumps({"caption": f"a dot {key}"}).encode(), f"{key}.png": media}
    data = write_tar(tmp_path / "some.tar", members)
    said = run("data", "captions", data, "--filter", run_folder, "--least", -1000, "--out", tmp_path / "new")
    assert said == f"{tmp_path / 'new'}: 2 samples with 2 captions; 1 samples left out\n"
    assert samples_of(tmp_path / "new").keys() == {"a", "c"}
    (line,) = (tmp_path / "new" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == "broken_image"


def test_the_command_makes_shards(shards: Path, run_folder: Path, tmp_path: Path) -> None:
    said = run("data", "captions", shards, "--captioner", run_folder, "--out", tmp_path / "new", "--num-beams", 1)
    found = samples_of(tmp_path / "new")
    assert found.keys() <= NAMES.keys()
    assert said.startswith(f"{tmp_path / 'new'}: {len(found)} samples with ")
    for key, fields in found.items():
        captions = fields.get("captions", [fields.get("caption")])
        written = fields.get("written")
        assert captions == [*NAMES[key], *([] if written is None else [written])]
        assert (fields["label"], fields["split"]) == (key, "train")
    # All pass a filter without a bound, none one that asks for too much.
    every = run("data", "captions", shards, "--filter", run_folder, "--least", -1000, "--out", tmp_path / "all")
    assert every == f"{tmp_path / 'all'}: 2 samples with 3 captions; 1 samples left out\n"
    with pytest.raises(DataError, match="missing_caption"):
        run("data", "captions", shards, "--filter", run_folder, "--least", 1000, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_who_writes_or_filters_has_to_be_named_and_to_be_able_to(
    shards: Path, run_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run("data", "captions", shards, "--out", tmp_path / "new")
    assert str(caught.value) == (
        "got neither --captioner nor --filter; allowed is one of them, or both; name a run folder"
    )
    for options, message in (
        (
            ("--filter", run_folder, "--matches", "itm"),
            f"--filter {run_folder}: stage 'pairs' does not train 'itm'; add the objective 'itm', or name another run",
        ),
        (
            ("--filter", run_folder, "--matches", "lm"),
            f"--filter {run_folder}: stage 'pairs' trains 'lm', which scores no pairs; name an objective that does, "
            "such as 'vlm', 'itm' or 'mmm', or name another run",
        ),
        (
            ("--captioner", run_folder, "--media", "video"),
            f"--captioner {run_folder}: stage 'pairs' has architecture 'blip', which takes no video; change "
            "model.kind, or name another run",
        ),
        (
            ("--captioner", run_folder, "--writes", "vlm"),
            "captions: got the objective 'vlm'; allowed are those of the stage that write ('lm'); name one of them, or "
            "use a stage that trains it",
        ),
    ):
        with pytest.raises(UserError) as caught:
            run("data", "captions", shards, *options, "--out", tmp_path / "new")
        assert str(caught.value) == message
    assert not (tmp_path / "new").exists()
