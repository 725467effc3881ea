"""The loader against a bare loop over the same samples: the cost of order, texts, batches and objectives.

python -m benchmarks.loader

The bare loop reads the samples, decodes them in full and augments them, one after the other on one thread, with the
functions that the loader uses; it tokenizes nothing, builds no batch and draws no masks. The loader does all of that,
once in its background thread (0 workers) and once in one worker process, but decodes a JPEG at the scale that the drawn
crop needs. Decoded pictures are not cached. Compared are CPU seconds from the arrival of the first batch on: of the
whole process, and with a worker of the busier of both processes, which bounds the rate. Other load on the machine
changes them little.
"""

import io
import json
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.measure import Ratio, Spread, alternate, over, rates, short
from benchmarks.record import Options, Report, Table, main_of
from omnivl.architectures import OmniVL
from omnivl.chain.preparation import Preparation
from omnivl.data.augment import training_view
from omnivl.data.batch import is_video
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.decode import decode_clip, decode_still
from omnivl.data.frames import sample_frames
from omnivl.data.limits import DecodeLimits
from omnivl.data.loader import Loader
from omnivl.data.order import Order
from omnivl.data.sources import open_source
from omnivl.data.text import may_flip
from omnivl.data.tokenizer import load_tokenizer
from omnivl.objectives import MCM, MFM, MLM, MRM, Objective, UniVLC
from omnivl.randomness import Streams, generator

SEED = 0
AT_LEAST = 1.0
AT_LEAST_OF_LARGE = 1.5
SPATIAL: Sequence[Objective] = (MLM(), MRM(), UniVLC())
TEMPORAL: Sequence[Objective] = (MFM(), MCM(), UniVLC())
CONFIG = LoaderConfig(cache_decoded=False)


@dataclass(frozen=True)
class Case:
    """Samples to load.

    Attributes:
        name: In the results.
        entry: Where they come from.
        model: Picture size and number of frames.
        objectives: Objectives of a stage with such samples, which draw inputs for each batch.
        micro_batch_size: Samples per batch.
        batches: Timed batches per turn.
        at_least: Target of the loader's rate over the bare loop's.
    """

    name: str
    entry: DataEntryConfig
    model: OmniVL
    objectives: Sequence[Objective]
    micro_batch_size: int
    batches: int
    at_least: float = AT_LEAST

    @property
    def timed(self) -> range:
        """Positions of the timed samples: all but those of the first batch."""
        return range(self.micro_batch_size, (self.batches + 1) * self.micro_batch_size)


def bare_loop(case: Case) -> Callable[[], list[NDArray[np.uint8]]]:
    """The bare loop over the timed samples of a case; returns the views of its last batch.

    Reading, decoding, the choice of frames and the augmentation are the loader's own functions with the loader's own
    draws, hence the pixels are the same where the loader, too, decodes in full.
    """
    entry, clips = case.entry, is_video(case.entry.kind)
    size = case.model.inputs.side(clips)
    source = open_source(entry, seed=SEED, num_frames=case.model.num_frames, size=case.model.video_size)
    order = Order(len(source), SEED, entry.key)
    indices = [(position, order(position)[1]) for position in case.timed]
    limits = DecodeLimits()
    frames, augment = (Streams(SEED, entry.key, what) for what in ("frames", "augment"))

    def loop() -> list[NDArray[np.uint8]]:
        views: list[NDArray[np.uint8]] = []
        for position, index in indices:
            sample = source.read(index)
            if clips:
                draws = frames.at(position)
                choose = partial(sample_frames, num_frames=case.model.num_frames, config=entry.frames, random=draws)
                pixels = decode_clip(sample, limits, choose)
            else:
                pixels = decode_still(sample, limits)
            flip = may_flip(sample.captions[0])
            view = training_view(pixels, size, entry.augment, augment.at(position), flip_allowed=flip)
            views.append(view.pixels)
            views = views[-case.micro_batch_size :]
        return views

    return loop


def loader_of(case: Case, workers: int) -> Loader:
    """A loader at the first sample of a case."""
    tokenizer = load_tokenizer("emoji")
    return Loader(
        [case.entry],
        loader_config=replace(CONFIG, num_workers=workers),
        sizes=case.model.inputs,
        tokenizer=tokenizer,
        prepare=Preparation(tuple(case.objectives), tokenizer.special, case.model.inputs, SEED),
        micro_batch_size=case.micro_batch_size,
        seed=SEED,
    )


def loader_seconds(case: Case, workers: int) -> float:
    """CPU seconds in which a loader hands out the timed batches of a case, of the busiest process."""
    with loader_of(case, workers) as loader:
        batches = iter(loader)
        next(batches)
        others = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        assert len(others) == workers, "no other child than the loader's workers"
        start = _cpu_seconds(others)
        for _ in range(case.batches):
            next(batches)
        return max(after - before for before, after in zip(start, _cpu_seconds(others), strict=True))


def _cpu_seconds(others: Sequence[psutil.Process]) -> list[float]:
    """Of this process and of others."""
    return [time.process_time(), *(sum(other.cpu_times()[:2]) for other in others)]


def bare_seconds(loop: Callable[[], object]) -> float:
    """CPU seconds of the bare loop."""
    start = time.process_time()
    loop()
    return time.process_time() - start


def photo(random: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A JPEG with about the decoding time of a photograph: coloured noise on all scales, weaker on the finer ones."""
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(1, 9):
        coarse = random.standard_normal((max(2, height >> (8 - octave)), max(2, width >> (8 - octave)), 3))
        picture += cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / octave**1.5
    pixels = np.clip(128 + 48 * picture, 0, 255).astype(np.uint8)
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done, "OpenCV writes JPEG"
    return encoded.tobytes()


def write_photos(path: Path, count: int, distinct: int, width: int = 500, height: int = 375) -> None:
    """A shard of generated photographs with captions; some are the same."""
    random = generator(SEED, "benchmark photos")
    photos = [photo(random, width, height) for _ in range(distinct)]
    with tarfile.open(path, "w") as shard:
        for number in range(count):
            caption = json.dumps({"caption": f"a photo of thing {number} on a table near a window"}).encode()
            for name, data in ((f"{number:05d}.jpg", photos[number % distinct]), (f"{number:05d}.json", caption)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                shard.addfile(header, io.BytesIO(data))


def cases_of(folder: Path, quick: bool) -> list[Case]:
    """The embedded drawings and clips, and photographs written into ``folder``."""
    count = 64 if quick else 512
    write_photos(folder / "photos.tar", count, count)
    drawings = DataEntryConfig(source="emoji", kind="image_text")
    photos = DataEntryConfig(source=str(folder / "photos.tar"), kind="image_text", name="photos")
    clips = DataEntryConfig(source="emoji", kind="video_text")
    tiny, base = OmniVL.presets["tiny"], OmniVL.presets["base"]
    large: list[Case] = []
    for width, height in ((1633, 1225), (3000, 2000), (4000, 3000)):
        path = folder / f"{width}.tar"
        write_photos(path, 16, 1 if quick else 4, width, height)
        entry = DataEntryConfig(source=str(path), kind="image_text", name=path.stem)
        name = f"photos of {width * height / 1e6:.0f} megapixels, {width} x {height} px JPEG to 224 px"
        large.append(Case(name, entry, base, SPATIAL, 4, 1 if quick else 3, AT_LEAST_OF_LARGE))
    return [
        Case("emoji drawings, 96 px WebP to 64 px", drawings, tiny, SPATIAL, 32, 6 if quick else 60),
        Case("photos, 500 x 375 px JPEG to 224 px", photos, base, SPATIAL, 16, 3 if quick else 30),
        Case("emoji clips, 8 frames of 96 px H.264 to 64 px", clips, tiny, TEMPORAL, 8, 3 if quick else 24),
        *large,
    ]


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender, one per round."""
    return alternate(
        {
            "bare loop": partial(bare_seconds, bare_loop(case)),
            "0 workers": partial(loader_seconds, case, 0),
            "1 worker": partial(loader_seconds, case, 1),
        },
        rounds,
    )


def run(options: Options) -> Report:
    """Runs the benchmark. It computes nothing on the model's device."""
    cv2.setNumThreads(0)  # one thread for the bare loop, as the loader has
    rounds = 2 if options.quick else 5
    ratios: list[Ratio] = []
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(Path(folder), options.quick)
        for case in cases:
            seconds = measure(case, rounds)
            rows.append([case.name, *(_rate(case, times) for times in seconds.values())])
            for name in ("0 workers", "1 worker"):
                value = over(seconds["bare loop"], seconds[name])
                ratios.append(Ratio(f"{case.name}: loader with {name} / bare loop", value, at_least=case.at_least))
    table = Table("Samples per CPU second", ("samples", "bare loop", "loader, 0 workers", "loader, 1 worker"), rows)
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    return Report("loader", what, ratios, [table], {case.name: _setting(case) for case in cases})


def _setting(case: Case) -> str:
    objectives = ", ".join(objective.key for objective in case.objectives)
    return f"{case.micro_batch_size} per batch, {case.batches} batches a turn; objectives: {objectives}"


def _rate(case: Case, seconds: Sequence[float]) -> str:
    value: Spread = rates(len(case.timed), seconds)
    return f"{short(value.median)} ({short(value.least)} to {short(value.most)})"


if __name__ == "__main__":
    main_of("loader", __doc__, run)
