"""Decoding on a GPU: what is refused where it cannot be, and the pixels of the CPU where it can."""

import importlib.util
from importlib import metadata
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from media_files import clip, oriented, saved

from omnivl.chain.gather import LocalGather
from omnivl.data import gpu_decode
from omnivl.data.config import DataEntryConfig
from omnivl.data.example import ExampleReader
from omnivl.data.gpu_decode import frames_on_gpu, gpu_for_decoding, jpeg_on_gpu
from omnivl.data.jpeg import decode_jpeg
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.sizes import InputSizes
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.video import decode_video
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet

SIZES = InputSizes(image_size=32, video_size=32, num_frames=2, patch_size=8, tubelet_size=1, text_length=6)

INSTALLED = importlib.util.find_spec("torchcodec") is not None
needs_gpu_decoding = pytest.mark.skipif(
    not (INSTALLED and torch.cuda.is_available()), reason="needs TorchCodec and a CUDA device"
)


def installed(monkeypatch: pytest.MonkeyPatch, version: str, cuda: bool) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    remedy = "`pip install 'torchcodec>=0.16'` (built for the CUDA of the installed torch), or set loader.decode to cpu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as missing:
        gpu_for_decoding("spawn", 2)
    assert str(missing.value) == (f"loader.decode: got gpu, which needs TorchCodec, and it is not installed; {remedy}")
    installed(monkeypatch, "0.9.1+cu130", cuda=True)
    with pytest.raises(DataError) as old:
        gpu_for_decoding("spawn", 2)
    assert str(old.value) == (f"loader.decode: got gpu, and TorchCodec 0.9.1+cu130; allowed 0.16 and later; {remedy}")
    installed(monkeypatch, "0.16.0", cuda=False)
    with pytest.raises(DataError) as none:
        gpu_for_decoding("spawn", 2)
    assert str(none.value) == (
        "loader.decode: got gpu, and torch finds no CUDA device; allowed on machines with one; set it to cpu"
    )
    installed(monkeypatch, "1.0.0", cuda=True)
    with pytest.raises(DataError) as forked:
        gpu_for_decoding("fork", 2)
    assert str(forked.value) == (
        "loader.decode: got gpu with loader.start_method fork: a forked process cannot use CUDA; "
        "allowed forkserver and spawn"
    )
    assert gpu_for_decoding("fork", 0) == gpu_for_decoding("spawn", 2) == "cuda:3"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that a GPU's decoders were called for; here they decode on the CPU."""
    devices: list[str] = []

    def picture(media: bytes, device: str) -> np.ndarray:
        devices.append(device)
        return decode_jpeg(media, 1, DEFAULT_LIMITS, "s")

    def frames(media: bytes, wanted: list[int], device: str) -> np.ndarray:
        devices.append(device)
        return decode_video(media, "s", DEFAULT_LIMITS, lambda total: wanted)

    monkeypatch.setattr("omnivl.data.decode.jpeg_on_gpu", picture)
    monkeypatch.setattr("omnivl.data.video.frames_on_gpu", frames)
    return devices


@pytest.mark.parametrize(
    ("media", "extension", "kind", "on_gpu"),
    [
        (saved("JPEG"), "jpg", "image", True),
        (oriented("JPEG", 6), "jpg", "image", False),
        (saved("JPEG", "CMYK"), "jpg", "image", False),
        (saved("PNG"), "png", "image", False),
        (clip(), "mp4", "video", True),
        (clip(turn=(90, False)), "mp4", "video", False),
        (clip(turn=(0, True)), "mp4", "video", False),
        (clip("mov", "qtrle", "argb"), "mov", "video", False),
    ],
)
def test_the_gpu_gets_what_it_shows_as_the_cpu_does(sent, media, extension, kind, on_gpu):
    made = [
        ExampleReader(
            DataEntryConfig("s", kind), None, SIZES, key="k", seed=0, limits=DEFAULT_LIMITS, device=device
        ).finish(Sample("k", "s:k", media, extension), 0)
        for device in (None, "cuda:1")
    ]
    assert sent == (["cuda:1"] if on_gpu else [])
    assert np.array_equal(made[0].pictures, made[1].pictures)


@pytest.mark.parametrize(("media", "extension", "kind"), [(saved("JPEG"), "jpg", "image"), (clip(), "mp4", "video")])
def test_only_errors_of_the_file_count_as_a_bad_sample(monkeypatch, media, extension, kind):
    raised: list[Exception] = []

    def fails(*args: object, **kwargs: object) -> None:
        raise raised[-1]

    monkeypatch.setattr(gpu_decode, "_decoders", lambda: SimpleNamespace(decode_jpeg=fails, VideoDecoder=fails))
    sample = Sample("k", "s:k", media, extension)

    def read(device: str) -> None:
        given = {"key": "k", "seed": 0, "limits": DEFAULT_LIMITS, "device": device}
        ExampleReader(DataEntryConfig("s", kind), None, SIZES, **given).finish(sample, 0)

    raised.append(RuntimeError("no such marker"))
    with pytest.raises(BadSampleError, match=r"s:k: broken_.*: RuntimeError: no such marker"):
        read("cpu")  # a device that still computes
    with pytest.raises(DataError) as failed:
        read("cuda:77")  # one that does not
    assert str(failed.value).startswith("loader.decode: got gpu, and cuda:77 failed while it decoded: ")
    for error in (torch.OutOfMemoryError("2 GiB"), RuntimeError("cuvidCreateDecoder: CUDA_ERROR_OUT_OF_MEMORY")):
        raised.append(error)
        with pytest.raises(DataError) as full:
            read("cpu")
        assert str(full.value) == (
            f"loader.decode: got gpu, and cpu failed while it decoded: {type(error).__name__}: {error}; no sample is "
            "to blame; start again, with fewer loader.num_workers or a smaller micro-batch if its memory is full, or "
            "set loader.decode to cpu"
        )


@pytest.mark.parametrize(("media", "extension", "moves"), [(saved("JPEG"), "jpg", False), (clip(), "mp4", True)])
def test_evaluations_decode_where_the_encoder_says(sent, media, extension, moves):
    pictures = PictureSet.of([Sample("k", "s:k", media, extension)], "video" if moves else "image", SIZES)
    shown = [
        Encoder(None, None, None, LocalGather(), torch.device("cpu"), decodes_on=device).shown(pictures, [0])
        for device in (None, "cuda:1")
    ]
    assert sent == ["cuda:1"]
    assert torch.equal(shown[0], shown[1])


@needs_gpu_decoding
def test_pixels_of_a_jpeg_are_those_of_the_cpu():
    shades = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    smooth = cv2.resize(shades, (320, 240), interpolation=cv2.INTER_CUBIC)
    media = cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    expected = decode_jpeg(media, 1, DEFAULT_LIMITS, "s")
    found = jpeg_on_gpu(media, "cuda")
    assert found.shape == expected.shape and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 1 and difference.max() < 16


@needs_gpu_decoding
def test_frames_of_a_clip_are_those_of_the_cpu():
    media = clip()
    wanted = [0, 3, 3, 11]
    expected = decode_video(media, "s", DEFAULT_LIMITS, lambda total: wanted)
    found = frames_on_gpu(media, wanted, "cuda")
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).mean() < 4
    assert np.array_equal(decode_video(media, "s", DEFAULT_LIMITS, lambda total: wanted, device="cuda"), found)
