"""The loader with pictures of their own sizes: the same samples in any layout, and equal work for all replicas."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tar_files import write_tar

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.chain.state import State
from omnivl.data.augment import evaluation_view
from omnivl.data.batch import Batch
from omnivl.data.collate import PATCH_STRIDE, Collator, from_strip
from omnivl.data.config import AugmentConfig, DataEntryConfig, LoaderConfig
from omnivl.data.example import ExampleReader
from omnivl.data.limits import DecodeLimits
from omnivl.data.loader import Loader
from omnivl.data.tokenizer import WordPieceTokenizer
from omnivl.objectives import MLM, MRM, UniVLC

pytestmark = pytest.mark.integration

PATCH, REPLICAS, EACH = 8, 4, 16
MODEL = OmniVL(
    hidden_size=16,
    num_heads=2,
    vision_layers=2,
    text_layers=1,
    alignment_layers=1,
    generation_layers=0,
    image_size=128,
    video_size=64,
    patch_size=PATCH,
    text_length=8,
    vocab_size=40,
    projection_size=8,
    sizes="native",
)
OBJECTIVES = (UniVLC(), MLM(), MRM())
WORDS = ["thing", "a", "picture", "of", "red", *(f"w{number}" for number in range(20))]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
COUNT = 192


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Log-normal in area and ratio, from 8 to 250 pixels a side."""
    random = np.random.default_rng(0)
    area, ratio = random.normal(4.2, 0.8, COUNT), random.normal(0, 0.25, COUNT)
    sides = np.clip(np.exp(np.stack([area - ratio, area + ratio], axis=1)), 8, 250).astype(int)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sides.tolist()]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, pictures: list[np.ndarray]) -> Path:
    members = []
    for number, picture in enumerate(pictures):
        record = {"caption": f"thing w{number % 20}", "identity": f"i{number}"}
        png = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
        members += [(f"{number:03d}.png", png), (f"{number:03d}.json", json.dumps(record).encode())]
    return write_tar(tmp_path_factory.mktemp("own") / "0.tar", members)


Make = Callable[..., Loader]


@pytest.fixture
def make(shard: Path) -> Iterator[Make]:
    made: list[Loader] = []

    def build(*, replica: int = 0, replicas: int = 1, workers: int = 0, each: int = EACH, **options: object) -> Loader:
        augment = AugmentConfig(crop_scale=(0.5, 1.0), flip=0.0)
        loader = Loader(
            [DataEntryConfig(source=str(shard), kind="image_text", augment=augment)],
            loader_config=LoaderConfig(num_workers=workers),
            sizes=MODEL.inputs,
            tokenizer=TOKENIZER,
            prepare=Preparation(OBJECTIVES, TOKENIZER.special, MODEL.inputs, 0),
            micro_batch_size=each,
            seed=3,
            replica=replica,
            replicas=replicas,
            trims=True,
            **options,
        )
        made.append(loader)
        return loader

    yield build
    for loader in made:
        loader.close()


def taken(loader: Loader, count: int) -> list[Batch]:
    return [batch for batch, _ in islice(loader, count)]


def test_replicas_share_the_samples_of_one_process(make: Make) -> None:
    whole = taken(make(each=REPLICAS * EACH), 3)
    parts = [taken(make(replica=replica, replicas=REPLICAS), 3) for replica in range(REPLICAS)]
    for step, batch in enumerate(whole):
        own = {int(position): row for row, position in enumerate(batch.position)}
        found: list[int] = []
        for part in (parts[replica][step] for replica in range(REPLICAS)):
            assert part.grids is not None
            assert batch.grids is not None
            assert part.frames is not None
            assert batch.frames is not None
            positions = part.position.tolist()
            assert positions == sorted(positions)
            rows = torch.tensor([own[position] for position in positions])
            assert torch.equal(part.grids, batch.grids[rows])
            length = min(part.frames.shape[-1], batch.frames.shape[-1])
            assert torch.equal(part.frames[..., :length], batch.frames[rows][..., :length])
            assert part.frames.shape[-1] // PATCH == PATCH_STRIDE * -(-int(part.grids.prod(1).max()) // PATCH_STRIDE)
            patches = part.prepared["mrm/mask"].shape[-1]
            assert torch.equal(part.prepared["mrm/mask"], batch.prepared["mrm/mask"][rows][..., :patches])
            beyond = torch.arange(patches) >= part.grids.prod(1)[:, None]
            assert not part.prepared["mrm/mask"][:, 0][beyond].any()
            found += positions
        assert sorted(found) == sorted(own)


def test_all_replicas_get_the_same_work(make: Make) -> None:
    """By the operations of a whole step, and against samples in their order."""
    chain = build_chain(MODEL, OBJECTIVES, TOKENIZER.special)
    layout = plan_layout(OBJECTIVES, "image_text", EACH, 1)

    def work(batch: Batch, rows: slice = slice(None)) -> float:
        assert batch.grids is not None
        counts = batch.grids[rows].prod(1).tolist()
        return sum(chain_flops(chain, replace(layout, patches=float(count))) for count in counts)

    steps = 3
    parts = [taken(make(replica=replica, replicas=REPLICAS), steps) for replica in range(REPLICAS)]
    whole = taken(make(each=REPLICAS * EACH), steps)
    for step in range(steps):
        balanced = np.array([work(parts[replica][step]) for replica in range(REPLICAS)])
        assert balanced.max() / balanced.mean() <= 1.05
    naive = [
        np.array([work(batch, slice(replica * EACH, (replica + 1) * EACH)) for replica in range(REPLICAS)])
        for batch in whole
    ]
    assert max(one.max() / one.mean() for one in naive) > 1.2


def test_hardly_any_position_that_is_computed_is_padding(make: Make) -> None:
    chain = build_chain(MODEL, OBJECTIVES, TOKENIZER.special)
    for batch in taken(make(replicas=REPLICAS), 3):
        assert batch.grids is not None
        state = State.from_batch(batch, plan_layout(OBJECTIVES, "image_text", EACH, 1))
        kept = {name: one for layer in chain.layers for name, one in layer.kept_positions(state).items()}
        real = 2 * int((1 + batch.grids.prod(1)).sum())  # clean rows and masked ones
        assert real / len(kept["kept/visual"]) >= 0.95
        assert batch.frames is not None
        assert real / (2 * EACH * (1 + batch.frames.shape[-1] // PATCH)) < 0.6


def test_workers_make_the_same_batches(make: Make) -> None:
    options = {"replica": 1, "replicas": REPLICAS}
    for one, other in zip(taken(make(**options), 2), taken(make(workers=2, **options), 2), strict=True):
        assert torch.equal(one.grids, other.grids)
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.position, other.position)


def test_a_loader_resumes_where_it_stopped(make: Make) -> None:
    states, batches = [], []
    for batch, state in islice(make(replica=2, replicas=REPLICAS), 3):
        batches.append(batch)
        states.append(state)
    (again,) = taken(make(replica=2, replicas=REPLICAS, state=states[1]), 1)
    assert torch.equal(again.position, batches[2].position)
    assert torch.equal(again.frames, batches[2].frames)


def test_patches_stand_in_the_order_of_the_picture(make: Make, pictures: list[np.ndarray]) -> None:
    """Without augmentation a strip holds the resized picture."""
    loader = make()
    reader = ExampleReader(
        loader.entries[0],
        loader.sources[0],
        MODEL.inputs,
        key="own",
        seed=0,
        limits=DecodeLimits(),
        training=False,
    )
    examples = [reader.example(position)[0] for position in range(12)]
    batch = Collator(MODEL.inputs, TOKENIZER, trims=True).plain(examples, "image_text")
    assert batch.frames is not None
    assert batch.grids is not None
    for row, (rows, columns) in enumerate(batch.grids.tolist()):
        wanted = evaluation_view(pictures[row][None], (columns * PATCH, rows * PATCH)).pixels[0]
        again = from_strip(batch.frames[row], (rows, columns))[0]
        assert np.array_equal(again.numpy().transpose(1, 2, 0), wanted)
        for place in range(rows * columns):
            top, left = divmod(place, columns)
            patch = wanted[top * PATCH : (top + 1) * PATCH, left * PATCH : (left + 1) * PATCH]
            strip = batch.frames[row, 0, :, :, place * PATCH : (place + 1) * PATCH]
            assert np.array_equal(strip.numpy().transpose(1, 2, 0), patch)
