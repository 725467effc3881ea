"""Bad samples: counted by cause, logged, replaced; too many stop the run; and nothing of a shard is ever executed."""

import io
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from tar_files import write_tar

from omnivl.architectures import OmniVL
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.loader import Loader
from omnivl.data.tokenizer import WordPieceTokenizer
from omnivl.errors import DataError

pytestmark = pytest.mark.integration

MODEL = OmniVL(image_size=8, video_size=8, patch_size=4, num_frames=2, text_length=6)
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thing"])
PNG = cv2.imencode(".png", np.full((8, 8, 3), 90, dtype=np.uint8))[1].tobytes()
JPEG = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))[1].tobytes()
BOMB = PNG[:16] + (50_000).to_bytes(4, "big") * 2 + PNG[24:]
JSON = json.dumps({"caption": "thing"}).encode()


def good(count: int) -> list[tuple[str, bytes]]:
    return [pair for n in range(count) for pair in ((f"g{n:03d}.png", PNG), (f"g{n:03d}.json", JSON))]


@pytest.fixture
def load(tmp_path) -> Callable[..., Loader]:
    def build(
        source: str, *, kind: str = "image_text", entry: DataEntryConfig | None = None, **options: object
    ) -> Loader:
        config = LoaderConfig(**{"max_bad_fraction": 0.5, "min_samples_to_judge": 10, **options})
        return Loader(
            [entry or DataEntryConfig(source, kind)],
            loader_config=config,
            sizes=MODEL.inputs,
            tokenizer=TOKENIZER,
            micro_batch_size=4,
            quarantine_log=tmp_path / "log" / "quarantine.jsonl",
        )

    return build


def logged(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "log" / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("extension", "media", "text", "cause"),
    [
        ("jpg", JPEG[: len(JPEG) // 2], JSON, "broken_image"),
        ("png", PNG[:-20], JSON, "broken_image"),
        ("png", b"nothing like a picture", JSON, "broken_image"),
        ("png", BOMB, JSON, "too_many_pixels"),
        ("png", PNG, b"{}", "missing_caption"),
        ("png", PNG, b'{"caption": "  "}', "missing_caption"),
        ("png", PNG, b'{"caption": "\xc3("}', "invalid_utf8"),
        ("png", PNG, b'{"caption": "thing"', "wrong_json"),
        ("psd", PNG, JSON, "unknown_extension"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_counted_logged_and_replaced(load, tmp_path, extension, media, text, cause, workers):
    path = write_tar(tmp_path / "s.tar", [*good(11), (f"x.{extension}", media), ("x.json", text)])
    with load(str(path), num_workers=workers, start_method="fork") as loader:
        batches = [batch for batch, _ in islice(loader, 3)]
    assert [batch.size for batch in batches] == [4, 4, 4], "another sample stands in its place"
    assert [position for batch in batches for position in batch.position.tolist()] == list(range(12))
    assert loader.quarantine.counts == {cause: 1}
    (line,) = logged(tmp_path)
    assert (line["cause"], line["where"]) == (cause, f"{path}:x")
    assert line["detail"]


def test_broken_videos(load, tmp_path):
    clips = [(f"v{n}.mp4", b"broken") if n else ("v0.gif", gif()) for n in range(2)]
    members = [pair for name, data in clips for pair in ((name, data), (name.split(".")[0] + ".json", JSON))]
    with load(str(write_tar(tmp_path / "s.tar", members)), kind="video_text", max_bad_fraction=0.9) as loader:
        batch, _ = next(iter(loader))
    assert batch.frames.shape == (4, 2, 3, 8, 8)
    assert set(loader.quarantine.counts) == {"broken_video"}


def gif() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 255)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def test_bad_shards_are_skipped_within_the_share(load, tmp_path):
    write_tar(tmp_path / "0.tar", good(8))
    whole = write_tar(tmp_path / "1.tar", good(4)).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: 2048 * 2 + 700])
    (tmp_path / "2.tar").touch()
    (tmp_path / "3.tar").mkdir()
    for number in range(5, 8):
        write_tar(tmp_path / f"{number}.tar", good(2))
    loader = load(str(tmp_path / "{0..7}.tar"))
    assert loader.quarantine.counts == {"truncated_tar": 1, "empty_shard": 1, "unreadable_path": 2}
    assert sum(len(source) for source in loader.sources) == 8 + 2 + 6
    assert [line["where"] for line in logged(tmp_path)] == [str(tmp_path / f"{number}.tar") for number in (1, 2, 3, 4)]


def test_too_many_bad_shards_stop_the_run(load, tmp_path):
    write_tar(tmp_path / "0.tar", good(8))
    source = str(tmp_path / "{0..1}.tar")
    with pytest.raises(DataError) as error:
        load(source, max_bad_fraction=0.25)
    assert str(error.value) == (
        f"data source {source!r}: 1 of 2 shards are bad (50.0%); allowed: 25.0% (max_bad_fraction). Causes: "
        f"unreadable_path 1; the last one: {tmp_path}/1.tar: No such file or directory; all are named in "
        f"{tmp_path}/log/quarantine.jsonl. Mend or remove them, or raise max_bad_fraction"
    )


def test_too_many_bad_records_stop_the_run_when_it_opens(load, tmp_path):
    bad = [pair for n in range(5) for pair in ((f"x{n}.png", PNG), (f"x{n}.json", b"{}"))]
    source = str(write_tar(tmp_path / "s.tar", [*good(15), *bad]))
    with pytest.raises(DataError) as error:
        load(source, max_bad_fraction=0.1)
    assert str(error.value) == (
        f"data source {source!r}: 5 of 20 samples are bad (25.0%); allowed: 10.0% (max_bad_fraction). Causes: "
        f"missing_caption 5; the last one: {source}:x4: the sample has neither a caption nor a label; all are named in "
        f"{tmp_path}/log/quarantine.jsonl. Mend or remove them, or raise max_bad_fraction"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_pictures_stop_the_run_while_it_reads(load, tmp_path, workers):
    bad = [pair for n in range(10) for pair in ((f"x{n}.png", b"broken"), (f"x{n}.json", JSON))]
    source = str(write_tar(tmp_path / "s.tar", [*good(10), *bad]))
    with (
        load(source, max_bad_fraction=0.2, num_workers=workers, start_method="fork") as loader,
        pytest.raises(
            DataError, match=r"^data: \d+ of \d+ samples read are bad \(\d+\.\d%\); allowed: 20\.0% "
        ) as error,
    ):
        list(islice(loader, 40))
    assert f"Causes: broken_image {loader.quarantine.counts['broken_image']}; the last one: {source}:x" in str(
        error.value
    )
    assert str(error.value).endswith(
        f"no known picture header in 6 bytes; all are named in {tmp_path}/log/quarantine.jsonl. Mend or remove them, "
        f"or raise max_bad_fraction"
    )


def test_few_samples_are_not_judged(load, tmp_path):
    members = [*good(1), ("x.png", b"broken"), ("x.json", JSON)]
    with load(str(write_tar(tmp_path / "s.tar", members)), max_bad_fraction=0.0, min_samples_to_judge=1000) as loader:
        list(islice(loader, 5))
    assert loader.quarantine.counts["broken_image"] >= 4
    assert len(logged(tmp_path)) == 1, "a sample is named once, however often it comes"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_nothing_but_broken_pictures_ends_at_once(load, tmp_path, workers):
    source = str(write_tar(tmp_path / "s.tar", [("x.png", b"broken"), ("x.json", JSON)]))
    with load(source, num_workers=workers, start_method="fork") as loader, pytest.raises(DataError) as error:
        next(iter(loader))
    assert str(error.value) == (
        f"data source {source!r}: no good sample among 1 that were tried, the last one {source}:x: broken_image: no "
        f"known picture header in 6 bytes"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unforeseen_error_names_its_sample(load, tmp_path, monkeypatch, workers):
    source = str(write_tar(tmp_path / "s.tar", good(1)))
    loader = load(source, num_workers=workers, start_method="fork")
    monkeypatch.setattr("omnivl.data.example.decode_shrunk", lambda *_: 1 / 0)
    with loader, pytest.raises(DataError) as error:
        next(iter(loader))
    assert f"{source}:g000: unusable: ZeroDivisionError: division by zero" in str(error.value)


def test_substitutes_do_not_depend_on_the_run(load, tmp_path):
    bad = [pair for n in range(6) for pair in ((f"x{n}.png", b"broken"), (f"x{n}.json", JSON))]
    source = str(write_tar(tmp_path / "s.tar", [*good(12), *bad]))
    runs = []
    for workers in (0, 1):
        with load(source, num_workers=workers, start_method="fork", max_bad_fraction=1.0) as loader:
            runs.append([batch.frames.sum().item() for batch, _ in islice(loader, 6)])
    assert runs[0] == runs[1]


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_malicious_shard_is_not_executed(tmp_path, load, workers, stream):
    target = tmp_path / "executed"
    payload = pickle.dumps(_Payload(target))
    pickle.loads(pickle.dumps(_Payload(tmp_path / "works")))
    assert (tmp_path / "works").exists(), "the payload is live"
    code = f"open({str(target)!r}, 'w').close()".encode()
    members = good(8)
    for name in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "tenbin", "mp", "msg", "cbor", "py"):
        members += [(f"m-{name}.{name}", payload), (f"m-{name}.json", JSON)]  # as the only media
        members += [(f"n-{name}.png", PNG), (f"n-{name}.{name}", payload), (f"n-{name}.json", JSON)]  # beside one
    for extension in ("png", "jpg", "webp"):
        members += [(f"p-{extension}.{extension}", payload), (f"p-{extension}.json", JSON)]  # in disguise
    members += [("q.png", PNG), ("q.json", b'{"caption": "__import__(\'os\')", "__reduce__": "x"}')]
    members += [("r.png", PNG), ("r.json", payload), ("s.png", PNG), ("s.txt", code), ("s.cls", payload)]
    members += [("../../escape.png", PNG), ("../../escape.json", JSON)]
    path = write_tar(tmp_path / "s.tar", members)
    source = f"pipe:cat {path}" if stream else str(path)
    options = {"num_workers": workers, "start_method": "fork", "max_bad_fraction": 1.0, "shuffle_buffer": 8}
    with load(source, **options) as loader:
        list(islice(loader, 15))
    assert loader.quarantine.counts["broken_image"] > 0
    assert not target.exists()
    assert not (tmp_path.parent.parent / "escape.png").exists()


class _Picky(WordPieceTokenizer):
    """A tokenizer that cannot read some texts."""

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        if any("odd" in text for text in texts):
            raise RuntimeError("cannot read this")
        return super().encode(texts, length)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_text_that_the_tokenizer_cannot_read_is_a_bad_sample(load, tmp_path, monkeypatch, workers, stream):
    picky = _Picky(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "thing"])
    monkeypatch.setattr(sys.modules[__name__], "TOKENIZER", picky)
    members = [*good(8), ("odd.png", PNG), ("odd.json", b'{"caption": "odd"}')]
    source = str(write_tar(tmp_path / "s.tar", members))
    loader = load(
        f"pipe:cat {source}" if stream else source,
        num_workers=workers,
        start_method="fork",
        max_bad_fraction=1.0,
        shuffle_buffer=1,  # in its own order a stream gives the odd sample in every ninth place
    )
    with loader:
        batches = [batch for batch, _ in islice(loader, 6)]
    assert loader.quarantine.counts["unusable"] >= 1
    line = next(line for line in logged(tmp_path) if line["cause"] == "unusable")
    assert line["where"].endswith("s.tar:odd")
    assert line["detail"] == "RuntimeError: cannot read this"
    assert "in encode" in line["traceback"]
    assert all("odd" not in caption for batch in batches for caption in batch.captions)
    if not stream or not workers:
        assert [place for batch in batches for place in sorted(batch.position.tolist())] == list(range(24))


def test_an_unused_caption_with_half_a_surrogate_pair_does_not_matter(load, tmp_path):
    half = b'{"captions": ["thing", "thing \\ud83d"]}'
    source = str(write_tar(tmp_path / "s.tar", [("x.png", PNG), ("x.json", half)]))
    with load(source) as loader:
        batch, _ = next(iter(loader))
    assert batch.captions == ("thing",) * 4
    entry = DataEntryConfig(source, "image_text", caption="join")
    with pytest.raises(DataError, match=r"s.tar:x: invalid_utf8: '.ud83d' at character \d+ of a text is no character"):
        next(iter(load(source, entry=entry)))
