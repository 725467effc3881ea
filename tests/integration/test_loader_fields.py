"""Kinds beside pairs, named texts and pictures, and fields, from shards through data workers to batches."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tar_files import write_tar
from torch import Tensor

from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import Batch
from omnivl.data.config import AugmentConfig, DataEntryConfig, LoaderConfig
from omnivl.data.fields import Field
from omnivl.data.loader import Loader, LoaderState
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import WordPieceTokenizer

pytestmark = pytest.mark.integration

SIZES = InputSizes(image_size=16, video_size=16, num_frames=2, patch_size=4, tubelet_size=1, text_length=8)
WORDS = ["what", "is", "it", "same", "red", "blue", *(f"w{number}" for number in range(12))]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
COUNT = 12
ASKED = {
    "answers": Field("text", most=3, length=5),
    "weights": Field("number", most=3, as_many_as="answers"),
    "region": Field("boxes", most=2),
    "inside": Field("mask"),
}
VQA = {
    "text": "question",
    "fields": {"answers": "answers", "weights": "weights", "region": "boxes", "inside": "mask.png", "id": "id"},
}


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def write(path: Path, members: Mapping[str, bytes]) -> str:
    return str(write_tar(path, members))


@pytest.fixture
def shard(tmp_path) -> str:
    """White rectangles on black, each with its box, its mask and a question; two pictures and a text more.

    Entries have names: draws are keyed by them, and the path of the shard differs from run to run.
    """
    members: dict[str, bytes] = {}
    for number in range(COUNT):
        pixels, mask = np.zeros((24, 32, 3), np.uint8), np.zeros((24, 32), np.uint8)
        left, top = number, number // 2 + 4
        pixels[top : top + 12, left : left + 16] = 255
        mask[top : top + 12, left : left + 16] = 1
        record = {
            **{"question": "what is it", "answers": ["red", f"w{number}"], "weights": [0.75, 0.25], "id": 100 + number},
            **{"boxes": [[left / 32, top / 24, (left + 16) / 32, (top + 12) / 24]], "caption": f"w{number}"},
        }
        members |= {f"s{number:02d}.png": png(pixels), f"s{number:02d}.json": json.dumps(record).encode()}
        members |= {f"s{number:02d}.mask.png": png(mask)}
        members |= {f"s{number:02d}.{side}.png": png(np.full((8, 8, 3), 20 * number, np.uint8)) for side in "ab"}
    return write(tmp_path / "s.tar", members)


def loader(
    *entries: DataEntryConfig, workers: int = 0, asked: Mapping[str, Field] = ASKED, **options: object
) -> Loader:
    config = LoaderConfig(num_workers=workers, prefetch_factor=2, start_method="fork", max_bad_fraction=0.9)
    own = {entry.key: asked for entry in entries}
    return Loader(
        entries, loader_config=config, sizes=SIZES, tokenizer=TOKENIZER, asked=own, **{"micro_batch_size": 4, **options}
    )


def entries(shard: str) -> tuple[DataEntryConfig, ...]:
    augment = AugmentConfig(crop_scale=(0.6, 1.0), rand_augment_operations=1)
    return (
        DataEntryConfig(shard, "image_text", name="vqa", augment=augment, **VQA),
        DataEntryConfig(shard, "text", name="said"),
        DataEntryConfig(shard, "image", name="shown", augment=augment),
        DataEntryConfig(shard, "images_text", augment=augment, pictures=("a", "b.png"), name="pairs"),
    )


def same(first: Batch, second: Batch) -> None:
    assert (first.kind, first.captions, first.entry) == (second.kind, second.captions, second.entry)
    for name in ("frames", "token_ids", "identity", "label", "position"):
        mine, other = getattr(first, name), getattr(second, name)
        assert (mine is None and other is None) or torch.equal(mine, other), name
    assert first.fields.keys() == second.fields.keys()
    for name, value in first.fields.items():
        other = second.fields[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_every_kind(shard):
    found: dict[str, Batch] = {}
    with loader(*entries(shard)) as batches:
        for batch, _ in islice(batches, 24):
            batch.check()
            found.setdefault(batch.entry, batch)
    assert set(found) == {"vqa", "said", "shown", "pairs"}
    text, image = found["said"], found["shown"]
    assert (text.frames, text.num_frames, text.visual, text.size) == (None, 0, "none", 4)
    assert all(caption.startswith("w") for caption in text.captions)
    assert (image.token_ids, image.captions, image.visual) == (None, (), "image")
    assert image.frames.shape == (4, 1, 3, 16, 16)
    assert len(set(image.identity.tolist())) == 4
    pairs = found["pairs"]
    assert (pairs.frames.shape, pairs.visual, pairs.num_frames) == ((4, 2, 3, 16, 16), "set", 2)
    assert pairs.token_ids.shape == (4, 8)


def test_a_question_with_answers_and_places(shard):
    cropped = AugmentConfig(crop_scale=(0.4, 0.8))
    with loader(DataEntryConfig(shard, "image_text", name="vqa", augment=cropped, **VQA)) as batches:
        seen = [batch for batch, _ in islice(batches, 6)]
    for batch in seen:
        assert set(batch.captions) == {"what is it"}
        for row, (answers, number) in enumerate(zip(batch.fields["answers"], batch.fields["id"], strict=True)):
            assert answers == ("red", f"w{number - 100}")
            assert TOKENIZER.decode(batch.fields["answers/token_ids"][row, 1].tolist()) == answers[1]
        assert batch.fields["answers/present"].tolist() == [[True, True, False]] * 4
        assert batch.fields["weights"].tolist() == [[0.75, 0.25, 0.0]] * 4
        white = batch.frames[:, 0].amin(dim=1) > 127
        inside, boxes = batch.fields["inside"], batch.fields["region"]
        assert (white ^ inside).float().mean() < 0.08, "the rectangle is seen where the mask says, but for its rim"
        for row in range(4):
            if batch.fields["region/present"][row, 0]:
                rows, columns = np.nonzero(inside[row].numpy())
                outer = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 16
                np.testing.assert_allclose(boxes[row, 0], outer, atol=1.3 / 16)
        assert not boxes[:, 1].any()
    kept = torch.cat([batch.fields["region/present"][:, 0] for batch in seen])
    assert 0 < kept.sum() < len(kept), "some crops leave too little of the rectangle"


def test_workers_change_nothing(shard):
    with loader(*entries(shard)) as batches:
        wanted = [batch for batch, _ in islice(batches, 10)]
    with loader(*entries(shard), workers=2) as batches:
        for mine, (other, _) in zip(wanted, islice(batches, 10), strict=True):
            same(mine, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_stopped(shard, workers):
    with loader(*entries(shard)) as batches:
        wanted = [batch for batch, _ in islice(batches, 9)]
    with loader(*entries(shard), workers=workers) as batches:
        _, state = list(islice(batches, 4))[-1]
    again = LoaderState.from_json(json.loads(json.dumps(state.to_json())))
    with loader(*entries(shard), workers=workers, state=again) as batches:
        for mine, (other, _) in zip(wanted[4:], islice(batches, 5), strict=True):
            same(mine, other)


def test_parts_equal_the_joined_batch(shard):
    with loader(entries(shard)[0], micro_batch_size=6) as batches:
        joined, _ = next(iter(batches))
    parts = []
    for replica in range(2):
        with loader(entries(shard)[0], micro_batch_size=3, replica=replica, replicas=2) as batches:
            parts.append(next(iter(batches))[0])
    for name, value in joined.fields.items():
        first, second = (part.fields[name] for part in parts)
        assert torch.equal(value, torch.cat([first, second])) if isinstance(value, Tensor) else value == first + second


def test_bad_fields_go_to_quarantine(tmp_path):
    good = {"question": "what is it", "answers": ["red"], "weights": [1.0], "boxes": [[0, 0, 1, 1]], "id": 1}
    picture = png(np.zeros((8, 8, 3), np.uint8))
    changes: dict[str, dict[str, object]] = {
        **{f"good{number}": {} for number in range(6)},
        **{"none": {"answers": None}, "typed": {"weights": ["a lot"]}, "fewer": {"weights": []}},
        **{"pixels": {"boxes": [[0, 0, 224, 224]]}, "silent": {"question": ""}, "odd": {"question": 3}},
    }
    members: dict[str, bytes] = {}
    for key, change in changes.items():
        record = json.dumps({**good, **change}).encode()
        members |= {f"{key}.png": picture, f"{key}.json": record, f"{key}.mask.png": picture}
    del members["good5.mask.png"]
    path, log = write(tmp_path / "s.tar", members), tmp_path / "quarantine.jsonl"
    entry = DataEntryConfig(path, "image_text", name="vqa", **VQA)
    with loader(entry, quarantine_log=log) as batches:
        for batch, _ in islice(batches, 12):
            assert set(batch.captions) == {"what is it"}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["where"].rpartition(":")[2]: line["cause"] for line in lines} == {
        **{"none": "missing_field", "typed": "wrong_field", "fewer": "wrong_field", "pixels": "wrong_field"},
        **{"silent": "missing_caption", "odd": "wrong_field", "good5": "missing_field"},
    }


def test_what_prepare_sees_and_what_goes_on(shard):
    seen: list[Batch] = []

    def prepare(batch: Batch, entry: str, step: int) -> dict[str, Tensor]:
        assert entry == batch.entry
        seen.append(batch)
        return {"vqa/first": torch.tensor([len(answers) for answers in batch.fields["answers"]])}

    with loader(entries(shard)[0], prepare=prepare) as batches:
        batch, _ = next(iter(batches))
    assert seen[0].fields["id"] == batch.fields["id"]
    state = State.from_batch(batch, StepLayout("image_text", 4, 1))
    assert state["vqa/first"].tolist() == [2] * 4
    assert {name for name in state if name.startswith("field/")} == {
        *{"field/answers/token_ids", "field/answers/present", "field/weights", "field/weights/present"},
        *{"field/region", "field/region/present", "field/inside", "field/inside/present"},
    }
    assert all(isinstance(value, Tensor) for value in state.values())
