"""Promises of the loader: each sample of an epoch once in any layout, exact resume, parts equal the joined batch."""

import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import av
import cv2
import numpy as np
import pytest
import torch
from tar_files import write_tar

from omnivl.architectures import OmniVL
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import Batch
from omnivl.data.config import AugmentConfig, DataEntryConfig, LoaderConfig
from omnivl.data.loader import Loader, LoaderState
from omnivl.data.prefetch import THREAD_NAME
from omnivl.data.tokenizer import WordPieceTokenizer
from omnivl.errors import DataError
from omnivl.objectives import MCM, MFM, MLM, MRM, Objective, UniVLC

pytestmark = pytest.mark.integration

MODEL = OmniVL(image_size=16, video_size=16, patch_size=4, num_frames=4, text_length=10, vocab_size=40)
WORDS = ["thing", "a", "picture", "of", "red", "blue", "clip", *(f"w{number}" for number in range(20))]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
NUM_STILLS, NUM_CLIPS = 30, 12


def clip(value: int, frames: int = 8) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for number in range(frames):
            pixels = np.full((16, 16, 3), (value + 8 * number) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Two shards with noise pictures and a few clips."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for number in range(NUM_STILLS):
        picture = cv2.imencode(".png", random.integers(0, 256, (20, 24, 3), dtype=np.uint8))[1].tobytes()
        record = {"caption": f"thing w{number % 20} red", "label": f"w{number % 4}", "identity": f"i{number}"}
        members += [(f"s{number:03d}.png", picture), (f"s{number:03d}.json", json.dumps(record).encode())]
    for number in range(NUM_CLIPS):
        record = {"caption": f"clip w{number}"}
        members += [(f"v{number:03d}.mp4", clip(10 * number)), (f"v{number:03d}.json", json.dumps(record).encode())]
    for half, part in enumerate((members[:40], members[40:])):
        write_tar(folder / f"{half}.tar", part)
    return str(folder / "{0..1}.tar")


Make = Callable[..., Loader]


@pytest.fixture
def make(shards) -> Iterator[Make]:
    made: list[Loader] = []

    def build(
        kinds: Sequence[str] = ("image_text",),
        *,
        objectives: Sequence[Objective] = (),
        workers: int = 0,
        prefetch: int = 2,
        **options,
    ) -> Loader:
        augment = AugmentConfig(brightness=0.4, hue=0.1, rand_augment_operations=2)
        defaults = {
            "loader_config": LoaderConfig(num_workers=workers, prefetch_factor=prefetch, start_method="fork"),
            "sizes": MODEL.inputs,
            "tokenizer": TOKENIZER,
            "prepare": Preparation(tuple(objectives), TOKENIZER.special, MODEL.inputs, options.get("seed", 0)),
            "micro_batch_size": 4,
        }
        entries = [DataEntryConfig(shards, kind, weight=index + 1, augment=augment) for index, kind in enumerate(kinds)]
        made.append(Loader(entries, **{**defaults, **options}))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def same(first: Batch, second: Batch) -> None:
    assert (first.kind, first.captions) == (second.kind, second.captions)
    for name in ("frames", "token_ids", "identity", "label", "position"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.prepared.keys() == second.prepared.keys()
    for name, tensor in first.prepared.items():
        assert torch.equal(tensor, second.prepared[name]), name


def used(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    return [pair for b in batches for pair in zip(b.position.tolist(), b.identity.tolist(), strict=True)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_an_epoch_holds_each_sample_once_with_resumes_at_random_points(make, replicas, workers):
    micro = {1: 5, 2: 3, 3: 5, 4: 2}[replicas]
    steps = -(-2 * NUM_STILLS // (micro * replicas))  # two epochs
    cuts = sorted(np.random.default_rng(replicas).choice(np.arange(1, steps), size=2, replace=False).tolist())
    taken: list[tuple[int, int]] = []
    for replica in range(replicas):
        state, done = None, 0
        for stop in [*cuts, steps]:
            loader = make(workers=workers, micro_batch_size=micro, replica=replica, replicas=replicas, state=state)
            for batch, reached in islice(loader, stop - done):
                taken += used([batch])
                state = LoaderState.from_json(json.loads(json.dumps(reached.to_json())))
            loader.close()
            done = stop
    taken.sort()
    assert [position for position, _ in taken] == list(range(steps * micro * replicas))
    for epoch in range(2):
        identities = [identity for _, identity in taken[epoch * NUM_STILLS : (epoch + 1) * NUM_STILLS]]
        assert len(set(identities)) == NUM_STILLS


def test_changing_the_layout_at_a_resume_loses_and_doubles_nothing(make):
    """4 replicas x 2, then 1 x 6 with workers, then 3 x 2: 8 * 2 + 6 * 2 + 6 * 2 = 40 positions in a row."""
    state, taken = None, []
    for replicas, micro, workers in [(4, 2, 0), (1, 6, 2), (3, 2, 1)]:
        reached = []
        for replica in range(replicas):
            loader = make(workers=workers, micro_batch_size=micro, replica=replica, replicas=replicas, state=state)
            pairs = list(islice(loader, 2))
            taken += used([batch for batch, _ in pairs])
            reached.append(pairs[-1][1])
            loader.close()
        assert len({json.dumps(entry.to_json()) for entry in reached}) == 1, "every replica has the same state"
        state = reached[0]
    assert sorted(position for position, _ in taken) == list(range(40))
    first_epoch = [identity for _, identity in sorted(taken)[:NUM_STILLS]]
    assert len(set(first_epoch)) == NUM_STILLS


OBJECTIVES = [MLM(), MRM(), MFM(), MCM(), UniVLC()]


@pytest.mark.parametrize("kind", ["image_text", "image_label", "video_text"])
def test_replicas_batches_concatenated_equal_the_joined_batch(make, kind):
    joined = make([kind], micro_batch_size=6, objectives=OBJECTIVES)
    parts = [make([kind], micro_batch_size=3, objectives=OBJECTIVES, replica=r, replicas=2) for r in range(2)]
    for (whole, _), (left, _), (right, _) in islice(zip(joined, *parts, strict=False), 4):
        for name in ("frames", "token_ids", "identity", "label", "position"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(left, name), getattr(right, name)])), name
        assert whole.captions == left.captions + right.captions
        assert whole.prepared.keys() == left.prepared.keys()
        for name, tensor in whole.prepared.items():
            if tensor.shape[:1] == (6,) and not name.endswith(("/chosen", "/masked")):  # positions over all rows
                one, other = left.prepared[name], right.prepared[name]
                offset = 3 if name.endswith("/rows") else 0  # rows count within the micro-batch
                assert torch.equal(tensor, torch.cat([one, other + offset] if offset else [one, other])), name


def test_workers_and_prefetch_change_nothing(make):
    kinds = ["image_text", "video_text", "image_label"]
    reference = [batch for batch, _ in islice(make(kinds, objectives=OBJECTIVES, prefetch=1), 8)]
    for workers, prefetch in [(0, 7), (1, 1), (2, 3)]:
        loader = make(kinds, objectives=OBJECTIVES, workers=workers, prefetch=prefetch)
        for expected, (batch, _) in zip(reference, islice(loader, 8), strict=True):
            same(batch, expected)
        loader.close()


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_the_safe_ways_to_start_workers_give_the_same(make, start_method):
    expected, _ = next(iter(make()))
    config = LoaderConfig(num_workers=1, start_method=start_method)
    batch, _ = next(iter(make(loader_config=config)))
    same(batch, expected)


def test_frames_of_workers_lie_in_memory_that_is_used_again_and_stay_while_they_are_held(make):
    kinds = ["image_text", "video_text"]
    expected = [batch for batch, _ in islice(make(kinds), 30)]
    loader = make(kinds, workers=1, prefetch=1)
    places: list[int] = []
    for wanted, (batch, _) in zip(expected, islice(loader, 30), strict=True):
        same(batch, wanted)
        places.append(batch.frames.data_ptr())
    loader.close()
    assert len(set(places)) <= 3, "one that is made, one that waits, one that is held"
    # more are held than there are slots: the others are in memory of their own
    held = [batch for batch, _ in islice(make(kinds, workers=1, prefetch=1), 30)]
    assert len({batch.frames.data_ptr() for batch in held}) == 30
    for wanted, batch in zip(expected, held, strict=True):
        same(batch, wanted)


def test_iterating_again_goes_on_after_the_last_batch(make):
    straight = [batch for batch, _ in islice(make(), 6)]
    loader = make(prefetch=5)
    broken = [batch for batch, _ in islice(loader, 2)] + [batch for batch, _ in islice(loader, 4)]
    for one, other in zip(straight, broken, strict=True):
        same(one, other)


def test_the_mixture_and_the_state_by_hand(make):
    loader = make(["image_text", "video_text"], micro_batch_size=2, replicas=3, replica=1)
    counts = {"image": 0, "video": 0}
    for step, (batch, state) in enumerate(islice(loader, 20)):
        media = batch.kind[:5]
        # replica 1 of 3 has the second pair of the 6 positions that the step uses
        assert batch.position.tolist() == [6 * counts[media] + 2, 6 * counts[media] + 3]
        counts[media] += 1
        assert state.micro_step == step + 1
        assert sum(state.positions.values()) == 6 * (step + 1)
    assert loader.mixture.counts(20) == (counts["image"], counts["video"])


def test_places_are_the_states_without_the_batches(make):
    with (
        make(("image_text", "video_text"), replicas=2) as loader,
        make(("image_text", "video_text"), replicas=2) as blind,
    ):
        pairs = zip(islice(iter(loader), 7), islice(blind.places(), 7), strict=True)
        for (_, state), (nothing, place) in pairs:
            assert place == state
            assert nothing is None


def test_weights_follow_the_optimizer_step(make):
    loader = make(objectives=[MLM(weight=2.0, weight_warmup_steps=4)], gradient_accumulation_steps=2)
    weights = [float(batch.prepared["weight/mlm"]) for batch, _ in islice(loader, 10)]
    assert weights == [0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.0, 2.0]


def test_another_accumulation_goes_on_at_the_same_optimizer_step(make):
    _, state = list(islice(make(gradient_accumulation_steps=2), 6))[-1]
    loader = make(gradient_accumulation_steps=3, state=state)
    assert loader.state.micro_step == 9, "optimizer step 3"
    batch, _ = next(iter(loader))
    assert batch.position.tolist() == [24, 25, 26, 27], "positions go on"
    _, inside = list(islice(make(gradient_accumulation_steps=2), 3))[-1]
    with pytest.raises(DataError) as error:
        make(gradient_accumulation_steps=3, state=inside)
    assert str(error.value) == (
        "data state at micro-batch 1 of 2 of optimizer step 1: gradient_accumulation_steps cannot change to 3 there; "
        "resume from the end of a step"
    )


def test_starting_workers_leaves_the_global_generator_alone(make):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(make(workers=1)))
    assert torch.equal(torch.rand(1), expected)


def test_closing_stops_the_thread(make):
    def running() -> int:
        return sum(thread.name == THREAD_NAME for thread in threading.enumerate())

    before = running()
    loader = make()
    next(iter(loader))
    assert running() == before + 1
    loader.close()
    assert running() == before


def test_labels_identities_and_prompts(make):
    batch, _ = next(iter(make(["image_label"], micro_batch_size=8)))
    for caption, label, identity in zip(batch.captions, batch.label.tolist(), batch.identity.tolist(), strict=True):
        assert caption == f"a picture of w{label}"
        others = [i for i, other in zip(batch.identity.tolist(), batch.label.tolist(), strict=True) if other == label]
        assert set(others) == {identity}, "samples of a class share y"
    assert len(set(batch.identity.tolist())) == len(set(batch.label.tolist()))
