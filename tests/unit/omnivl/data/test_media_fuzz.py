"""Damaged files of every form: only bad samples leave the place that names them, in bounded time and memory."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from media_fuzz import damaged, good_files, good_records

from omnivl.data.config import AugmentConfig, DataEntryConfig, LoaderConfig
from omnivl.data.decode import decode_clip, decode_still, evaluation_frames
from omnivl.data.example import ExampleReader
from omnivl.data.fields import Field
from omnivl.data.inspect_media import media_facts, thumbnail
from omnivl.data.limits import DecodeLimits
from omnivl.data.record import parse_record
from omnivl.data.sizes import InputSizes
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.sources.shards import to_sample

SIZES = InputSizes(image_size=16, video_size=16, num_frames=3, text_length=12, patch_size=8, tubelet_size=1)
LIMITS = DecodeLimits()
_ODD = (
    None,
    True,
    -1,
    1e308,
    float("nan"),
    10**30,
    "",
    " ",
    "\ud83d",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"": []},
    "x" * 5000,
)
_AUGMENT = AugmentConfig(rotate=20, color_probability=1.0, hue=0.1, rand_augment_operations=2)
_ASKED = {
    "answers": Field("text", most=3, required=False),
    "boxes": Field("boxes", most=2, required=False),
    "count": Field("number", required=False),
    "mask": Field("mask", required=False),
}
_FIELDS = {"answers": "answers", "boxes": "boxes", "count": "count", "mask": "mask.png"}


class Worst:
    """What all inputs together did: outcomes, and the most seconds and memory of one."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.seconds = (0.0, "")
        self.mebibytes = (0.0, "")

    def look(self, what: str, call: Callable[[], object]) -> None:
        """Calls; only a bad sample with its name may leave it."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        before, start = _memory("VmRSS"), time.process_time()
        try:
            call()
            self.outcomes["good"] += 1
        except BadSampleError as error:
            if not error.rejection.where.startswith("s.tar:k"):
                raise
            self.outcomes[error.rejection.cause] += 1
        self.seconds = max(self.seconds, (time.process_time() - start, what))
        self.mebibytes = max(self.mebibytes, ((_memory("VmHWM") - before) / 1024, what))

    def within(self, seconds: float, mebibytes: float) -> None:
        """Checks the worst, and shows it."""
        print(f"{sum(self.outcomes.values())} inputs", dict(self.outcomes), self.seconds, self.mebibytes)
        assert self.seconds[0] < seconds, self.seconds
        assert self.mebibytes[0] < mebibytes, self.mebibytes


def _memory(name: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def readers() -> dict[str, ExampleReader]:
    made = {}
    for kind in ("image_text", "video_text"):
        config = DataEntryConfig(source="s.tar", kind=kind, augment=_AUGMENT, caption="join", fields=_FIELDS)
        made[kind] = ExampleReader(config, None, SIZES, key="k", seed=0, limits=LIMITS, asked=_ASKED)
    return made


def ways(made: dict[str, ExampleReader], media: bytes, extension: str) -> dict[str, Callable[[], object]]:
    """All that is ever done with the bytes of a sample."""
    one = Sample("k", "s.tar:k", media, extension, captions=("a ball",), members={"mask.png": media})
    return {
        "still": lambda: decode_still(one, LIMITS, needed=8),
        "clip": lambda: decode_clip(one, LIMITS, lambda total: [0, total // 2, total - 1]),
        "evaluation": lambda: evaluation_frames(one, 16, 2, LoaderConfig()),
        "image_text": lambda: made["image_text"].finish(one, 3),
        "video_text": lambda: made["video_text"].finish(one, 3),
        "facts": lambda: media_facts(one),
        "thumbnail": lambda: thumbnail(one),
    }


def fuzz_media(inputs: int, seed: int) -> Worst:
    """Each of ``inputs`` damaged files, in one of the ways after the other."""
    files, made, worst = good_files(), readers(), Worst()
    random = np.random.default_rng(seed)
    names = sorted(files)
    for number in range(inputs):
        name = names[number % len(names)]
        media, extension = files[name]
        bad = damaged(media, random, files[names[int(random.integers(len(names)))]][0])
        calls = ways(made, bad, extension)
        kinds = list(calls)
        for way in (kinds[(number // len(names)) % 7], kinds[int(random.integers(7))]):
            worst.look(f"{way} of {name}, input {number}", calls[way])
    return worst


def fuzz_texts(inputs: int, seed: int) -> Worst:
    """Damaged JSON and texts, and JSON that is whole but has odd values in its fields."""
    made, worst = readers(), Worst()
    random = np.random.default_rng(seed)
    records = good_records()
    picture = good_files()["png RGB"][0]
    for number in range(inputs):
        members = dict(records[number % len(records)])
        for extension, data in members.items():
            if extension == "json" and random.random() < 0.6:
                row = json.loads(data)
                keys = ["caption", "captions", "label", "identity", "lang", "flip", *row, *_FIELDS]
                for _ in range(int(random.integers(1, 4))):
                    value = _ODD[int(random.integers(len(_ODD)))]
                    value = [value, value] if random.random() < 0.2 else value
                    row[keys[int(random.integers(len(keys)))]] = value
                members[extension] = json.dumps(row).encode()
            else:
                members[extension] = damaged(data, random, b'{}[],:"\\ud83d' * 8)

        def read(members: dict[str, bytes] = members, number: int = number) -> object:
            record = parse_record(members, "s.tar:k")
            one = to_sample(record, key="k", where="s.tar:k", media=picture, extension="png", language="en", members={})
            return made["image_text"].finish(one, number)

        worst.look(f"text {number}: {members}", read)
    return worst


def test_good_files_are_good():
    made = readers()
    for name, (media, extension) in good_files().items():
        calls = ways(made, media, extension)
        calls["facts"]()
        calls["evaluation"]()
        calls["thumbnail"]()
        kind = "clip" if name.startswith(("clip", "gif")) or "moving" in name else "still"
        calls[kind]()


def test_damaged_media():
    worst = fuzz_media(400, seed=0)
    worst.within(seconds=5, mebibytes=600)
    assert worst.outcomes["good"] > 50
    assert worst.outcomes["broken_image"] > 50
    assert worst.outcomes["broken_video"] > 20


def test_damaged_texts():
    worst = fuzz_texts(400, seed=0)
    worst.within(seconds=2, mebibytes=100)
    assert worst.outcomes["good"] > 50
    assert {"wrong_json", "invalid_utf8", "wrong_field"} <= set(worst.outcomes)


@pytest.mark.full
def test_twenty_thousand_damaged_inputs():
    seed = int(os.environ.get("OMNIVL_FUZZ_SEED", "1"))
    fuzz_media(16_000, seed).within(seconds=30, mebibytes=1500)
    fuzz_texts(6_000, seed).within(seconds=2, mebibytes=100)
