"""The processor's tensors are those of evaluation, to the last bit."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, AutoTokenizer

from omnivl.data.augment import evaluation_view
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.decode import decode_clip, evaluation_frames
from omnivl.data.limits import DecodeLimits
from omnivl.data.sources import open_source
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import WordPieceTokenizer, load_tokenizer
from omnivl.errors import DataError
from omnivl.hub import OmniVLConfig, OmniVLImageProcessor, OmniVLProcessor

IMAGE, VIDEO, FRAMES, LENGTH = 24, 20, 5, 16


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> OmniVLProcessor:
    folder = tmp_path_factory.mktemp("processor")
    OmniVLConfig().save_pretrained(folder)
    tokenizer = load_tokenizer("emoji").as_transformers(LENGTH)
    OmniVLProcessor(OmniVLImageProcessor(IMAGE, VIDEO, FRAMES), tokenizer).save_pretrained(folder)
    read: OmniVLProcessor = AutoProcessor.from_pretrained(folder)
    return read


def samples(kind, count=6):
    source = open_source(DataEntryConfig(source="emoji", kind=kind), seed=0, num_frames=FRAMES, size=VIDEO)
    return [source.read(index * len(source) // count) for index in range(count)]


def test_pictures_from_files_bytes_and_memory(processor, tmp_path):
    pictures = samples("image_text")
    wanted = torch.stack([evaluation_frames(one, IMAGE, 1, LoaderConfig())[0] for one in pictures])
    made = processor(images=[one.media for one in pictures])["pixel_values"]
    assert made.dtype == torch.uint8 and torch.equal(made, wanted)
    files = [tmp_path / f"{number}.{one.extension}" for number, one in enumerate(pictures)]
    for file, one in zip(files, pictures, strict=True):
        file.write_bytes(one.media)
    assert torch.equal(processor(images=files)["pixel_values"], wanted)
    opened = [Image.open(io.BytesIO(one.media)) for one in pictures]
    assert torch.equal(processor(images=opened)["pixel_values"], wanted), "transparency shows white, as in training"
    assert torch.equal(processor(images=opened[0])["pixel_values"], wanted[:1]), "one alone"


def test_pictures_and_clips_may_be_stretched_and_a_folder_says_so(tmp_path):
    stretches = OmniVLImageProcessor(IMAGE, VIDEO, FRAMES, stretched=True)
    stretches.save_pretrained(tmp_path)
    read = OmniVLImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    wanted = torch.from_numpy(evaluation_view(pixels[None], (IMAGE, IMAGE)).pixels).permute(0, 3, 1, 2)
    view = torch.from_numpy(evaluation_view(pixels[None], (VIDEO, VIDEO)).pixels[0]).permute(2, 0, 1)
    for one in (stretches, read):
        assert torch.equal(one(images=[pixels])["pixel_values"], wanted)
        assert torch.equal(one(images=data.getvalue())["pixel_values"], wanted)
        clip = one(videos=np.stack([pixels] * FRAMES))["pixel_values_videos"]
        assert clip.shape == (1, FRAMES, 3, VIDEO, VIDEO) and torch.equal(clip[0, 2], view)
    cropped = OmniVLImageProcessor(IMAGE, VIDEO, FRAMES)(images=[pixels])["pixel_values"]
    assert cropped.shape == wanted.shape and not torch.equal(cropped, wanted)


def test_a_jpeg_is_decoded_as_in_evaluation(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (220, 310, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    wanted = evaluation_frames(Sample("a", "a", data.getvalue(), "jpg"), IMAGE, 1, LoaderConfig())[0]
    assert torch.equal(processor(images=data.getvalue())["pixel_values"][0], wanted)


def test_clips_from_bytes_and_frames(processor):
    clips = samples("video_text", 4)
    wanted = torch.stack([evaluation_frames(one, VIDEO, FRAMES, LoaderConfig()) for one in clips])
    made = processor(videos=[one.media for one in clips])["pixel_values_videos"]
    assert made.shape == (4, FRAMES, 3, VIDEO, VIDEO) and torch.equal(made, wanted)
    arrays = [decode_clip(one, DecodeLimits(), lambda total: list(range(total))) for one in clips]
    assert torch.equal(processor(videos=arrays)["pixel_values_videos"], wanted)
    assert torch.equal(processor(videos=arrays[0])["pixel_values_videos"], wanted[:1])
    frames = [[Image.fromarray(frame) for frame in array] for array in arrays]
    assert torch.equal(processor(videos=frames)["pixel_values_videos"], wanted)
    assert torch.equal(processor(videos=frames[1])["pixel_values_videos"], wanted[1:2]), "a list of frames is a clip"
    tensors = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays]
    assert torch.equal(processor(videos=tensors)["pixel_values_videos"], wanted)


def test_texts_are_those_of_the_plans_tokenizer(processor, tmp_path):
    tokenizer = load_tokenizer("emoji")
    random = np.random.default_rng(0)
    marks = [chr(code) for code in (*range(32, 127), *range(160, 400), 0x65E5, 0x1F600, 0x0301)]
    texts = ["".join(random.choice(marks, size=int(random.integers(0, 60)))) for _ in range(500)]
    texts += [caption for one in samples("image_text", 200) for caption in one.captions]
    texts += ["[SEP] [MASK] [DEC]", "", "x" * 101, "tab\there\nline", "##red"]
    wanted = torch.from_numpy(tokenizer.encode(texts, LENGTH))
    made = processor(text=texts)
    assert torch.equal(made["input_ids"], wanted)
    assert torch.equal(made["attention_mask"], (wanted != tokenizer.special.pad).long())
    plain = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(plain["input_ids"], wanted), "the tokenizer alone does the same"
    written = wanted.where(wanted != 1, tokenizer.special.pad)  # [UNK] is never written
    assert processor.batch_decode(written) == [tokenizer.decode(row) for row in written.tolist()]


@pytest.mark.parametrize("extra", [["[unused0]", "[unused1]"], [], ["[DEC]"]])
def test_the_start_of_generation_keeps_its_id(tmp_path, extra):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = WordPieceTokenizer([*special, *extra, *"abcdefghijklmnopq", "un", "##happy"])
    tokenizer.as_transformers(8).save_pretrained(tmp_path)
    read = load_tokenizer(str(tmp_path))
    texts = ["a b unhappy", "[DEC] [unused0] a"]
    assert read.encode(texts, 8).tolist() == tokenizer.encode(texts, 8).tolist()
    own, other = tokenizer.special, read.special
    assert (other.decode, other.vocab_size, other.pad, other.sep) == (own.decode, own.vocab_size, own.pad, own.sep)


def test_a_tokenizer_of_another_origin_is_framed_as_in_training(tmp_path):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    fast = WordPieceTokenizer([*special, "a", "b"]).as_transformers(8)
    fast.backend_tokenizer.post_processor = None  # frames nothing by itself
    fast.save_pretrained(tmp_path / "own")
    tokenizer = load_tokenizer(str(tmp_path / "own"))
    tokenizer.as_transformers(5).save_pretrained(tmp_path / "exported")
    processor = OmniVLProcessor(OmniVLImageProcessor(), AutoTokenizer.from_pretrained(tmp_path / "exported"))
    assert processor(text="a b a b a")["input_ids"].tolist() == tokenizer.encode(["a b a b a"], 5).tolist()


def test_what_cannot_be_read_is_said(processor, tmp_path):
    with pytest.raises(DataError, match=r"nothing.png: cannot be read \(No such file or directory\); name another"):
        processor(images=tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"^bytes: cannot be decoded"):
        processor(images=b"nothing of the kind")
    with pytest.raises(DataError, match=r"^picture: got float32 \[3, 8, 8\]; allowed are PIL images"):
        processor(images=torch.zeros(3, 8, 8))
    with pytest.raises(DataError, match=r"^picture: got int; allowed"):
        processor(images=3)
    file = Path(tmp_path / "half.png")
    Image.new("RGB", (8, 8)).save(file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="the png file ends early"):
        processor(images=str(file))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7, 8])
def test_pil_images_are_turned_upright_like_their_files(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((IMAGE, 2 * IMAGE, 3), dtype=np.uint8)
    pixels[: IMAGE // 2, :IMAGE] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name, exif=exif.tobytes(), **({"quality": 100} if name == "JPEG" else {}))
    opened = Image.open(io.BytesIO(file.getvalue()))
    processor = OmniVLImageProcessor(IMAGE, VIDEO, FRAMES)
    given = processor(opened)["pixel_values"].int()
    wanted = processor(file.getvalue())["pixel_values"].int()
    assert (given - wanted).abs().float().mean() < 2
    clip = processor(videos=[opened, opened])["pixel_values_videos"].int()
    whole = processor(videos=[np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))] * 2)["pixel_values_videos"]
    assert torch.equal(clip, whole.int())
