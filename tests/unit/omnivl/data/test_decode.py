import io
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np
import patience
import pytest
import torch
from PIL import Image, ImageOps

from omnivl.data import limits
from omnivl.data.config import LoaderConfig
from omnivl.data.decode import decode_clip, decode_still, evaluation_frames
from omnivl.data.formats import (
    frame_durations,
    is_animated,
    is_complete,
    leading_metadata,
    picture_format,
    picture_size,
)
from omnivl.data.inspect_media import media_facts
from omnivl.data.limits import DecodeLimits
from omnivl.data.orientation import picture_orientation
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.transparency import decoded_frames

LIMITS = DecodeLimits()


def sample(media: bytes, extension: str) -> Sample:
    return Sample("k", "s.tar:k", media, extension)


def pillow(name: str, mode: str = "RGB", size: tuple[int, int] = (30, 20), **options: object) -> bytes:
    file = io.BytesIO()
    gradient = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    Image.fromarray(gradient).convert(mode).save(file, name, **options)
    return file.getvalue()


def video(frames: int, gop: int, size: int = 32, name: str = "mp4", codec: str = "mpeg4", **options: str) -> bytes:
    """Frame n shows n in binary, one block of 8 x 8 pixels per bit, so that coarse coding cannot blur it."""
    file = io.BytesIO()
    with av.open(file, "w", format=name) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        for number in range(frames):
            bits = [255 * (number >> bit & 1) for bit in range((size // 8) ** 2)]
            blocks = np.array(bits, dtype=np.uint8).reshape(size // 8, size // 8)
            pixels = np.repeat(np.kron(blocks, np.ones((8, 8), dtype=np.uint8))[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def numbers(pixels: np.ndarray) -> list[int]:
    """Reads the numbers of ``video``'s frames ``[T, S, S, 3]``."""
    blocks = pixels[:, 4::8, 4::8, 0].reshape(len(pixels), -1) > 127
    return [sum(int(bit) << place for place, bit in enumerate(row)) for row in blocks.tolist()]


def rejected(call) -> tuple[str, str]:
    with pytest.raises(BadSampleError) as error:
        call()
    assert error.value.rejection.where == "s.tar:k"
    return error.value.rejection.cause, error.value.rejection.detail


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("GIF", {}),
    ],
)
def test_size_from_the_header_and_pixels_like_pillow(name, options):
    media = pillow(name, **options)
    assert picture_size(media) == (30, 20)
    pixels = decode_still(sample(media, {"JPEG": "jpg"}.get(name, name.lower())), LIMITS)
    assert pixels.shape == (1, 20, 30, 3)
    expected = np.asarray(Image.open(io.BytesIO(media)).convert("RGB"), dtype=int)
    assert np.abs(pixels[0].astype(int) - expected).mean() < 2


def test_size_behind_a_long_exif_block():
    media = pillow("JPEG")
    exif = b"\xff\xe1" + (60_000).to_bytes(2, "big") + bytes(59_998)
    assert picture_size(media[:2] + exif + media[2:]) == (30, 20)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16"])
def test_modes_of_png(mode):
    media = (
        pillow("PNG", mode)
        if mode != "I;16"
        else cv2.imencode(".png", np.full((20, 30), 65535, np.uint16))[1].tobytes()
    )
    assert decode_still(sample(media, "png"), LIMITS).shape == (1, 20, 30, 3)


def test_what_is_transparent_shows_white():
    bgra = np.zeros((2, 2, 4), dtype=np.uint8)
    bgra[0, 0] = (10, 20, 30, 255)
    bgra[0, 1] = (10, 20, 30, 0)
    bgra[1, 0] = (0, 0, 255, 128)  # red, half: (255 * 128 + 255 * 127) / 255 = 255, (0 + 255 * 127) / 255 = 127
    pixels = decode_still(sample(cv2.imencode(".png", bgra)[1].tobytes(), "png"), LIMITS)[0]
    assert pixels[0, 0].tolist() == [30, 20, 10]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[1, 0].tolist() == [255, 127, 127]


def test_every_colour_and_every_transparency_is_blended_to_the_nearest_value():
    values = np.arange(256, dtype=np.uint16)
    colour, alpha = np.meshgrid(values, values)
    bgra = np.stack([colour, colour, colour, alpha], axis=2).astype(np.uint8)
    pixels = decode_still(sample(cv2.imencode(".png", bgra)[1].tobytes(), "png"), LIMITS)[0]
    wanted = np.rint((colour * alpha.astype(np.float64) + 255.0 * (255 - alpha)) / 255)
    assert np.array_equal(pixels, np.repeat(wanted[..., None], 3, axis=2))


def test_cmyk_jpeg():
    assert decode_still(sample(pillow("JPEG", "CMYK"), "jpg"), LIMITS).shape == (1, 20, 30, 3)


def test_a_large_jpeg_is_decoded_at_a_fraction():
    media = pillow("JPEG", size=(400, 300))
    assert decode_still(sample(media, "jpg"), LIMITS).shape == (1, 300, 400, 3)
    # 3/8 of 300 is 112.5 -> 113 >= 100; 1/4 would be 75
    _, height, width, _ = decode_still(sample(media, "jpg"), LIMITS, needed=100).shape
    assert 100 <= height < 300
    assert 100 <= width < 400


@pytest.mark.parametrize(("name", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")])
def test_truncated_pictures(name, extension):
    media = pillow(name, size=(64, 64))
    for keep in (0.5, 0.9):
        cause, _ = rejected(lambda: decode_still(sample(media[: int(len(media) * keep)], extension), LIMITS))  # noqa: B023
        assert cause == "broken_image"


@pytest.mark.parametrize(
    "media", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X", b"<svg/>", b"GIF89a"]
)
def test_headers_without_a_body(media):
    assert picture_size(media) is None
    assert rejected(lambda: decode_still(sample(media, "jpg"), LIMITS))[0] == "broken_image"


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    media = bytearray(pillow("PNG"))
    media[16:24] = (60_000).to_bytes(4, "big") * 2  # the header now claims 3.6 gigapixels
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    cause, detail = rejected(lambda: decode_still(sample(bytes(media), "png"), LIMITS))
    assert cause == "too_many_pixels"
    assert detail == "60000 x 60000 pixels; allowed: 40000000 in all"


def test_unknown_extensions_are_refused():
    cause, detail = rejected(lambda: decode_still(sample(pillow("PNG"), "pyd"), LIMITS))
    assert cause == "unknown_extension"
    assert detail.startswith(".pyd is not read; known: avi, bmp, gif, jpeg, jpg")


@pytest.mark.parametrize(
    ("name", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4"), ("mp4", "libx264")]
)
@pytest.mark.parametrize(("gop", "most_kept"), [(1, 2**26), (6, 2**26), (6, 0), (100, 2**26)])
def test_video_frames_are_the_right_ones(monkeypatch, name, codec, gop, most_kept):
    monkeypatch.setattr("omnivl.data.video._MOST_KEPT", most_kept)
    media = video(60, gop, name=name, codec=codec)
    seen: list[int] = []

    def choose(total: int) -> list[int]:
        seen.append(total)
        return [0, 3, 3, 17, 40, 59]

    pixels = decode_clip(sample(media, "mp4"), LIMITS, choose)
    assert seen == [60]
    assert pixels.shape == (6, 32, 32, 3)
    assert numbers(pixels) == [0, 3, 3, 17, 40, 59]


@pytest.mark.parametrize("most_kept", [0, 2**26])
@pytest.mark.parametrize("name", ["mp4", "mpegts"])
def test_open_groups_of_pictures(monkeypatch, name, most_kept):
    """Frames shown before a key frame may need the group before it."""
    monkeypatch.setattr("omnivl.data.video._MOST_KEPT", most_kept)
    media = video(60, 8, name=name, codec="libx264", **{"x264-params": "open-gop=1:bframes=4"})
    assert numbers(decode_clip(sample(media, "mpg"), LIMITS, lambda total: [7, 22, 45, 58])) == [7, 22, 45, 58]


def test_a_jump_that_goes_too_far_is_made_good(monkeypatch):
    """The second frame wanted is overshot by the jump: decoding starts over and counts."""
    monkeypatch.setattr("omnivl.data.video._MOST_KEPT", 0)  # the packets of a long clip are searched in the file
    media = video(60, 6)
    jumps: list[int] = []
    original = av.container.InputContainer.seek

    class Overshooting:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._container.close()

        def seek(self, offset, **options):
            jumps.append(offset)
            original(self._container, 2 * offset, **options)

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: Overshooting(opened(*args, **options)))
    assert numbers(decode_clip(sample(media, "mp4"), LIMITS, lambda total: [1, 25, 40])) == [1, 25, 40]
    assert len(jumps) == 1, "the second reading does not jump"


@pytest.mark.parametrize("most_kept", [0, 2**20])
def test_only_frames_near_the_wanted_ones_are_decoded(monkeypatch, most_kept):
    media = video(60, 5)
    decoded: list[int] = []

    def counted(*arguments):
        for frame in decoded_frames(*arguments):
            decoded.append(1)
            yield frame

    monkeypatch.setattr("omnivl.data.video.decoded_frames", counted)
    monkeypatch.setattr("omnivl.data.video._MOST_KEPT", most_kept)
    pixels = decode_clip(sample(media, "mp4"), LIMITS, lambda total: [2, 31, 57])
    assert numbers(pixels) == [2, 31, 57]
    # 0..2, then from the key frames 30 and 55: 3 + 2 + 3 frames, and a few that the codec delivers late
    assert len(decoded) <= 12


def test_video_bounds_and_breakage():
    media = video(30, 6)
    assert rejected(lambda: decode_clip(sample(media, "mp4"), DecodeLimits(max_pixels=100), lambda n: [0])) == (
        "too_many_pixels",
        "32 x 32 pixels; allowed: 100 in all",
    )
    assert rejected(lambda: decode_clip(sample(media, "mp4"), DecodeLimits(max_frames=10), lambda n: [0])) == (
        "too_many_frames",
        "more than 10 frames; allowed: 10",
    )
    for broken in (b"", b"not a video", media[:200], media[: len(media) // 2]):
        assert rejected(lambda: decode_clip(sample(broken, "mp4"), LIMITS, lambda n: [n - 1]))[0] == "broken_video"  # noqa: B023


@pytest.mark.parametrize("name", ["WEBP", "GIF"])
def test_animated_pictures(name):
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (value, value, value)) for value in (40, 70, 100, 130)]
    frames[0].save(file, name, save_all=True, append_images=frames[1:], duration=40, loop=0)
    media = file.getvalue()
    assert is_animated(media[:64]) == (name == "WEBP")
    pixels = decode_clip(sample(media, name.lower()), LIMITS, lambda total: [0, total - 1])
    assert [round(float(frame.mean())) for frame in pixels] == [40, 130]
    cause, _ = rejected(lambda: decode_clip(sample(media, name.lower()), DecodeLimits(max_frames=3), lambda n: [0]))
    assert cause == "too_many_frames"


def test_evaluation_frames():
    still = evaluation_frames(sample(pillow("PNG"), "png"), 8, 1, LoaderConfig())
    assert (still.shape, still.dtype) == ((1, 3, 8, 8), torch.uint8)
    moving = evaluation_frames(sample(video(8, 8), "mp4"), 32, 4, LoaderConfig())
    assert numbers(moving.permute(0, 2, 3, 1).numpy()) == [1, 3, 5, 7]


def test_formats_by_content():
    assert picture_format(pillow("WEBP")) == "webp"
    assert picture_format(b"PK\x03\x04") is None
    assert not is_complete(pillow("PNG")[:-20])


def test_what_a_decoder_raises_is_a_bad_sample():
    """Cut, flipped and swapped bytes of every format: whatever fails is a bad sample with its name."""
    moving = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (value, 9, value)) for value in (40, 70, 100)]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:], duration=40)
    files = {name: pillow(name) for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF")} | {"mp4": video(6, 3)}
    files["moving"] = moving.getvalue()
    random = np.random.default_rng(0)
    named: list[str] = []
    for name, good in files.items():
        for _ in range(40):
            bad = bytearray(good[: random.integers(1, len(good) + 1)])
            for place in random.integers(0, len(bad), random.integers(0, 4)):
                bad[place] = random.integers(256)
            extension = {"JPEG": "jpg", "moving": "gif"}.get(name, name.lower())
            for decode in (decode_still, lambda *args: decode_clip(*args, lambda total: [total - 1])):
                try:
                    decode(sample(bytes(bad), extension), LIMITS)
                except BadSampleError as error:
                    named.append(error.rejection.where)
    assert set(named) == {"s.tar:k"}
    assert len(named) > 100


_TEXTS = [
    b"ffconcat version 1.0\nfile good.mp4\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50404 RTP/AVP 96\n"
    b"a=rtpmap:96 H264/90000\n",
]
_GUARDED = """
import ctypes, io, linecache, struct, sys
import av
from omnivl.data.decode import decode_clip
from omnivl.data.inspect_media import media_facts
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError, Sample
text = sys.stdin.buffer.read()
one = Sample("k", "s.tar:k", text, "mp4")
looks = {
    "clip": lambda: decode_clip(one, DecodeLimits(), lambda total: [0]),
    "facts": lambda: media_facts(one),
    "plain": lambda: av.open(io.BytesIO(text), container_options={"protocol_whitelist": "file,rtp,udp"}),
}
def tried():
    try:
        looks[sys.argv[1]]()
    except (BadSampleError, av.FFmpegError, OSError) as error:
        return str(error)
linecache.updatecache = lambda *_: []  # tracebacks quote no lines, which would be read from files
if sys.argv[1] != "plain":
    tried()  # once before, so that everything is imported
libc = ctypes.CDLL(None, use_errno=True)
refused = [2, 41, 49, 85, 257, 437]  # open, socket, bind, creat, openat, openat2
steps = [(0x20, 0, 0, 0)]  # the number of the call
steps += [(0x15, len(refused) - place, 0, number) for place, number in enumerate(refused)]
steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x80000000)]  # let it be; kill the process
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
sys.stdout.write(tried() or "opened")
sys.stdout.flush()
"""


def guarded(text: bytes, look: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Looks at a text in a process that the system kills when it opens a file or a socket."""
    with tempfile.TemporaryFile() as given:
        given.write(text)
        given.seek(0)
        return patience.run(
            [sys.executable, "-c", _GUARDED, look], limit=60, stdin=given, cwd=folder, capture_output=True
        )


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="filters system calls by number")
@pytest.mark.parametrize("text", _TEXTS, ids=["ffconcat", "HLS", "SDP"])
def test_a_text_that_names_other_files_or_sockets_opens_none(text, tmp_path):
    (tmp_path / "good.mp4").write_bytes(video(6, 3))
    if not text.startswith(b"#EXTM3U"):  # libav reads these by their content; it wants HLS by its name too
        assert guarded(text, "plain", tmp_path).returncode == -signal.SIGSYS, "without our lists it opens one"
    for look in ("clip", "facts"):
        done = guarded(text, look, tmp_path)
        assert done.returncode == 0, done.stderr
        assert b"broken_video" in done.stdout
        assert b"Invalid" in done.stdout


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_shown_upright(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if name == "JPEG" else {"lossless": True} if name == "WEBP" else {}
    media = pillow(name, exif=exif.tobytes(), **options)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(media))).convert("RGB"), dtype=int)
    pixels = decode_still(sample(media, {"JPEG": "jpg"}.get(name, name.lower())), LIMITS)[0]
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).mean() < 2


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_is_searched_where_it_can_lie_alone(name):
    exif = Image.Exif()
    exif[274] = 6
    turned, plain = pillow(name, exif=exif), pillow(name)
    assert picture_orientation(turned) == 6
    assert picture_orientation(plain) == 1
    if name == "JPEG":
        scan = plain.index(b"\xff\xda")
        assert leading_metadata(plain) == plain[:scan]
        assert leading_metadata(plain[:scan] + b"\0" + plain[scan:]) == plain[:scan] + b"\0" + plain[scan:]
    if name == "WEBP":
        assert leading_metadata(plain) == b""
        file = io.BytesIO()
        Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(file, name, lossless=False)
        assert file.getvalue()[12:16] == b"VP8X"
        assert leading_metadata(file.getvalue()) == b""


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_clips_are_shown_upright(degrees):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(degrees)
        pixels = np.zeros((16, 32, 3), dtype=np.uint8)
        pixels[:8, :16] = 255  # white at the upper left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    seen = decode_clip(sample(file.getvalue(), "mp4"), LIMITS, lambda total: [0])[0]
    wanted = np.rot90(pixels, degrees // 90)  # counterclockwise
    assert seen.shape == wanted.shape
    assert np.abs(seen.astype(int) - wanted).mean() < 8


@pytest.mark.parametrize(("mode", "key"), [("L", 120), ("1", 0)])
def test_the_transparent_value_of_a_grey_png_shows_white(mode, key):
    file = io.BytesIO()
    grey = Image.fromarray(np.array([[0, 255], [120, 120]], dtype=np.uint8)).convert(mode, dither=Image.Dither.NONE)
    grey.save(file, "PNG", transparency=key)
    seen = decode_still(sample(file.getvalue(), "png"), LIMITS)[0, :, :, 0].tolist()
    assert seen == ([[0, 255], [255, 255]] if mode == "L" else [[255, 255], [255, 255]])


def test_gif_whose_frame_exceeds_its_screen_is_measured_by_the_frame():
    media = bytearray(pillow("GIF", "P", (300, 200)))
    media[6:10] = b"\x01\0\x01\0"
    assert picture_size(bytes(media)) == (300, 200)
    with pytest.raises(BadSampleError, match="300 x 200 pixels; allowed: 1000 in all"):
        decode_still(sample(bytes(media), "gif"), DecodeLimits(max_pixels=1000))
    assert picture_size(bytes(media[:40])) is not None  # a cut file is measured as far as it goes


@pytest.mark.parametrize("stray", [b"\xff\x00", b"\x00\x11", b"\xff\xff", b"\xff\x00\x42\xff\x00"])
def test_size_of_a_jpeg_is_found_behind_stray_bytes(stray):
    media = pillow("JPEG", size=(300, 200))
    assert picture_size(media[:20] + stray + media[20:]) == (300, 200)
    assert picture_size(media[:2] + b"\xff\xe0\x00\x04ab" + stray + media[20:]) == (300, 200)


def test_bitmap_with_the_header_of_os2():
    rows = bytes([0, 0, 255, 255, 0, 0, 0, 0] * 2)  # 2 x 2 pixels: red, blue; rows are filled to 4 bytes
    header = b"BM" + (26 + len(rows)).to_bytes(4, "little") + bytes(4) + (26).to_bytes(4, "little")
    media = header + b"\x0c\0\0\0\x02\0\x02\0\x01\0\x18\0" + rows
    assert picture_size(media) == (2, 2)
    assert decode_still(sample(media, "bmp"), LIMITS)[0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(("name", "codec"), [("mpeg2video", "mpeg2video"), ("mpegts", "mpeg2video"), ("avi", "mpeg4")])
def test_clip_that_grows_is_refused_by_the_decoder_before_it_takes_memory(name, codec):
    grows = video(6, 1, 32, name, codec) + video(6, 1, 512, name, codec)
    with pytest.raises(BadSampleError, match="avcodec_send_packet"):
        decode_clip(sample(grows, "avi"), DecodeLimits(max_pixels=32 * 32), lambda total: list(range(total)))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_clip_of_exactly_the_limit_is_decoded_though_its_decoder_pads(codec):
    shown = decode_clip(sample(video(3, 1, 40, codec=codec), "mp4"), DecodeLimits(max_pixels=40 * 40), lambda n: [0, 2])
    assert shown.shape == (2, 40, 40, 3)


@pytest.mark.parametrize("turn", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ["mp4", "mov"])
def test_clips_are_turned_and_mirrored_by_their_display_matrix(name, turn):
    """Each of the eight orientations as a matrix (a, b, c, d): a stored point (p, q) is shown at (ap + cq, bp + dq)."""
    a, b, c, d = {
        2: (-1, 0, 0, 1),
        3: (-1, 0, 0, -1),
        4: (1, 0, 0, -1),
        5: (0, 1, 1, 0),
        6: (0, 1, -1, 0),
        7: (0, -1, -1, 0),
        8: (0, -1, 1, 0),
    }[turn]
    one = 1 << 16
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:16, :32] = 255  # white at the upper left
    pixels[:16, 32:, 0] = 200  # red at the upper right
    file = io.BytesIO()
    with av.open(file, "w", format=name) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_matrix([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    seen = decode_clip(sample(file.getvalue(), name), LIMITS, lambda total: [0])[0]
    exif = Image.Exif()
    exif[0x0112] = turn  # as the same value of EXIF turns a picture
    picture = Image.fromarray(pixels)
    picture.info["exif"] = exif.tobytes()
    wanted = np.asarray(ImageOps.exif_transpose(picture))
    assert seen.shape == wanted.shape
    assert np.abs(seen.astype(int) - wanted).mean() < 8
    facts = media_facts(sample(file.getvalue(), name))
    assert (facts.width, facts.height) == ((32, 64) if turn >= 5 else (64, 32))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_still_among_clips_is_what_it_is_among_pictures(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    one = sample(pillow(name, exif=exif.tobytes()), {"JPEG": "jpg"}.get(name, name.lower()))
    assert np.array_equal(decode_clip(one, LIMITS, lambda total: [0] * 3), np.repeat(decode_still(one, LIMITS), 3, 0))


def test_sixteen_bits_of_grey_stay_grey_among_clips():
    media = cv2.imencode(".png", np.full((20, 30), 20_000, np.uint16))[1].tobytes()
    assert decode_clip(sample(media, "png"), LIMITS, lambda total: [0])[0, 5, 5].tolist() == [78, 78, 78]


@pytest.mark.parametrize("name", ["WEBP", "PNG"])
def test_moving_pictures_are_turned_upright(name):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(np.full((10, 20, 3), value, np.uint8)) for value in (40, 200)]
    for frame in frames:
        frame.paste((255, 255, 255), (0, 0, 10, 5))  # upper left, shown at the upper right
    file = io.BytesIO()
    frames[0].save(file, name, save_all=True, append_images=frames[1:], exif=exif.tobytes(), lossless=True)
    seen = decode_clip(sample(file.getvalue(), name.lower()), LIMITS, lambda total: [0, 1])
    assert seen.shape == (2, 20, 10, 3)
    assert (seen[:, :10, 5:] == 255).all()
    assert seen[:, 15, 2].max(axis=1).tolist() == [40, 200 if name == "WEBP" else 40], "an APNG is its default image"
    facts = media_facts(sample(file.getvalue(), name.lower()))
    assert (facts.width, facts.height) == (10, 20)


def gif(frames: int, canvas: int, *, between: bytes = b"", frame: int = 1, tail: bytes = b";") -> bytes:
    """A GIF of ``canvas`` x ``canvas`` pixels whose frames cover ``frame`` x ``frame``, with bytes before each."""
    small = pillow("GIF", "L", (frame, frame))
    start = small.index(b",\0\0\0\0")
    picture = small[start : start + 9] + b"\0" + small[start + 10 : -1]
    assert not small[start + 9] & 0x80, "the frame has no colours of its own"
    head = b"GIF89a" + canvas.to_bytes(2, "little") * 2 + b"\x80\0\0\0\0\0\xff\xff\xff"
    return head + (between + picture) * frames + tail


def test_gif_of_many_frames_on_a_large_canvas_is_refused_before_it_is_painted():
    """38 kB that took minutes: the time is the number of frames times the canvas, whatever each frame changes."""
    media = gif(1500, 3000)
    assert len(media) < 40_000
    start = time.process_time()
    cause, detail = rejected(lambda: decode_clip(sample(media, "gif"), LIMITS, lambda total: [0, total - 1]))
    assert cause == "too_many_frames"
    assert detail.startswith("1500 frames of 3000 x 3000 pixels to decode; allowed: 1000000000 pixels")
    assert decode_clip(sample(media, "gif"), LIMITS, lambda total: [0, 1]).shape == (2, 3000, 3000, 3), "only two"
    assert media_facts(sample(media, "gif")).frames == 1500
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "between",
    [b"\x55", b"\x00\x00", b"!\xf9\x04\0\1\0\0\0", b"!\xf9\0\1x\0", b"!\xfe\2ab\0", b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"],
)
def test_gif_is_measured_as_its_decoder_reads_it(between):
    """Stray bytes and odd extensions before a frame that exceeds the screen."""
    media = gif(3, 4, between=between, frame=300)
    with Image.open(io.BytesIO(media)) as picture:
        assert picture.n_frames == len(frame_durations(media)) == 3
        picture.seek(2)
        assert picture.size == picture_size(media) == (300, 300)
    for decode in (decode_still, lambda *args: decode_clip(*args, lambda total: [total - 1])):
        cause, detail = rejected(lambda: decode(sample(media, "gif"), DecodeLimits(max_pixels=1000)))  # noqa: B023
        assert (cause, detail) == ("too_many_pixels", "300 x 300 pixels; allowed: 1000 in all")


def test_durations_of_a_gif_are_its_frames_own():
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (value, 9, value)) for value in (40, 70, 100)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=[40, 0, 250])
    facts = media_facts(sample(file.getvalue(), "gif"))
    assert (facts.frames, facts.seconds) == (3, 0.29)


@pytest.mark.parametrize("name", ["mp4", "gif"])
def test_frames_that_cannot_be_held_at_once_are_refused(name, monkeypatch):
    monkeypatch.setattr("omnivl.data.limits._MAX_WANTED", 3 * 32 * 32)
    media = video(8, 4) if name == "mp4" else gif(8, 32)
    assert len(decode_clip(sample(media, name), LIMITS, lambda total: [1, 1, 2, 5])) == 4, "one of them twice"
    cause, detail = rejected(lambda: decode_clip(sample(media, name), LIMITS, lambda total: [0, 1, 2, 3]))
    assert cause == "too_many_pixels"
    assert detail.startswith("4 frames of 32 x 32 pixels at once; allowed: 3072 pixels; scale it down")


def test_video_that_decodes_too_much_is_refused(monkeypatch):
    """Key frames are as far apart as a file likes; the number of frames decoded follows from them."""
    monkeypatch.setitem(limits._MAX_DECODED, "video", 20 * 32 * 32)
    rare, often = video(60, 100), video(60, 6)
    cause, detail = rejected(lambda: decode_clip(sample(rare, "mp4"), LIMITS, lambda total: [0, 40]))
    assert (cause, detail.partition(";")[0]) == ("too_many_frames", "41 frames of 32 x 32 pixels to decode")
    assert numbers(decode_clip(sample(often, "mp4"), LIMITS, lambda total: [0, 40])) == [0, 40], "by a jump to 36"


@pytest.mark.full
def test_clip_that_grows_is_opened_in_bounded_memory():
    """libav decodes some frames when it opens a file; those of 8,192 pixels took 290 MB there."""
    grows = video(3, 1, 16, "mpegts", "libx264") + video(1, 1, 8192, "mpegts", "libx264", preset="ultrafast")
    script = """
import sys
from omnivl.data.decode import decode_clip
from omnivl.data.inspect_media import media_facts
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources.base import BadSampleError, Sample
media = sys.stdin.buffer.read()
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
for look in (lambda one: decode_clip(one, DecodeLimits(), lambda total: [total - 1]), media_facts):
    try:
        look(Sample("k", "s.tar:k", media, "mpg"))
    except BadSampleError:
        print("refused")
print(peak() - before)
"""
    with tempfile.TemporaryFile() as given:
        given.write(grows)
        given.seek(0)
        done = patience.run([sys.executable, "-c", script], limit=100, stdin=given, capture_output=True, check=True)
    *refused, mebibytes = done.stdout.decode().split()
    assert refused[0] == "refused"
    assert int(mebibytes) < 150


def test_codec_that_nobody_knows_is_a_bad_sample():
    media = video(6, 3, name="avi").replace(b"FMP4", b"ZZZZ").replace(b"xvid", b"ZZZZ")
    cause, _ = rejected(lambda: decode_clip(sample(media, "avi"), LIMITS, lambda total: [0]))
    assert cause == "broken_video"
    assert rejected(lambda: media_facts(sample(media, "avi")))[0] == "broken_video"
