"""The loader over the embedded set, generated clips and streams."""

import json
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from tar_files import write_tar

from omnivl.architectures import OmniVL
from omnivl.data.batch import DATA_KINDS
from omnivl.data.config import AugmentConfig, DataEntryConfig, LoaderConfig
from omnivl.data.loader import Loader
from omnivl.data.tokenizer import load_tokenizer

PAIRED = DATA_KINDS[:4]  # something to see, with a text

pytestmark = pytest.mark.integration

MODEL = OmniVL(image_size=24, video_size=16, patch_size=8, num_frames=4, text_length=12)


def loader(*entries: DataEntryConfig, **options: object) -> Loader:
    workers = options.pop("num_workers", 0)
    return Loader(
        entries,
        loader_config=LoaderConfig(num_workers=workers, start_method="fork", shuffle_buffer=4, prefetch_factor=2),
        sizes=MODEL.inputs,
        tokenizer=load_tokenizer("emoji"),
        **{"micro_batch_size": 4, **options},
    )


@pytest.mark.parametrize(
    ("source", "kind"),
    [*(("emoji", kind) for kind in PAIRED), ("motion", "video_text"), ("motion", "video_label")],
)
def test_the_sources_that_the_package_carries(source, kind):
    with loader(DataEntryConfig(source, kind)) as batches:
        batch, _ = next(iter(batches))
    frames, size = (4, 16) if kind.startswith("video") else (1, 24)
    assert batch.frames.shape == (4, frames, 3, size, size)
    assert all(batch.captions)
    assert batch.frames.float().std() > 5, "there is something to see"
    if kind.endswith("label"):
        assert int(batch.label.min()) >= 0
    if source == "motion":
        assert not torch.equal(batch.frames[:, 0], batch.frames[:, -1]), "something moves"
    tokenizer = load_tokenizer("emoji")
    assert tokenizer.decode(batch.token_ids[0].tolist()).replace(" ", "") in batch.captions[0].lower().replace(" ", "")


def test_motion_clips_are_never_mirrored():
    """Plain crops and a flip wherever it is allowed: the same clips as without any flip."""
    plain = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    found = []
    for flip in (0.0, 1.0):
        entry = DataEntryConfig("motion", "video_label", augment=AugmentConfig(flip=flip, **plain))
        with loader(entry, micro_batch_size=8) as batches:
            found.append(next(iter(batches))[0].frames)
    assert torch.equal(*found)


def test_a_concept_has_one_identity_in_all_styles_and_as_a_clip():
    entries = [DataEntryConfig("emoji", kind) for kind in ("image_text", "video_text")]
    with loader(*entries) as batches:
        stills, clips = batches.sources
        names = {stills.read(index).identity for index in range(len(stills))}
        assert {clips.read(index).identity for index in range(len(clips))} <= names


@pytest.fixture
def stream(tmp_path) -> str:
    """``pipe:`` over eight shards of six samples."""
    png = cv2.imencode(".png", np.full((8, 8, 3), 90, dtype=np.uint8))[1].tobytes()
    for shard in range(8):
        members = {}
        for number in range(6):
            text = json.dumps({"caption": f"{shard} {number}", "label": "x"}).encode()
            members |= {f"{number}.png": png, f"{number}.json": text}
        write_tar(tmp_path / f"{shard}.tar", members)
    return f"pipe:cat {tmp_path}/{{0..7}}.tar"


@pytest.mark.parametrize(("replicas", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_streams_are_dealt_over_replicas_and_workers(stream, replicas, workers):
    seen: list[str] = []
    for replica in range(replicas):
        with (
            pytest.warns(UserWarning, match="is a stream: .* resumes by shard instead of by sample"),
            loader(
                DataEntryConfig(stream, "image_text"), replica=replica, replicas=replicas, num_workers=workers
            ) as batches,
        ):
            seen += [text for batch, _ in islice(batches, 12 // replicas) for text in batch.captions]
    # 48 samples of 48; every reader has whole shards, but a buffer of 4 holds some back and lets others in
    readers = replicas * max(1, workers)
    assert len(seen) == 48
    assert len(set(seen)) >= 48 - 4 * readers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:data source")
def test_a_stream_resumes_at_a_shard_and_loses_nothing(stream, workers):
    entry = DataEntryConfig(stream, "image_text")
    with loader(entry, num_workers=workers) as batches:
        pairs = list(islice(batches, 8))
    seen = {text for batch, _ in pairs for text in batch.captions}
    state = pairs[-1][1]
    (shard,) = state.shards.values()
    # 32 of 48 samples: five shards are done at most. Of two workers the slower one may still be in its first shard.
    assert (0 if workers else 1) <= shard <= 5
    with loader(entry, num_workers=workers, state=state) as batches:  # enough for the slower of two workers as well
        seen |= {text for batch, _ in islice(batches, 28) for text in batch.captions}
    assert len(seen) == 48
