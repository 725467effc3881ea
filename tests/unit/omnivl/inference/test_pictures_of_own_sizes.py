"""What a model makes of pictures of their own sizes does not depend on which others are computed with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from omnivl.architectures import CLIP, OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import WordPieceTokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import writing_search
from omnivl.inference.pictures import Media, PictureSet
from omnivl.objectives import LM, VLM, UniVLC

WORDS = ["red", "cat", "sun", "on", "a", "tree"]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
SMALL = {"image_size": 32, "num_frames": 4, "patch_size": 8, "text_length": 8, "vocab_size": 12, "sizes": "native"}
NARROW = {"hidden_size": 16, "num_heads": 2, "layers": 2}
OMNIVL = OmniVL(
    hidden_size=16,
    num_heads=2,
    vision_layers=2,
    text_layers=1,
    alignment_layers=1,
    generation_layers=1,
    video_size=32,
    projection_size=8,
    momentum=None,
    **SMALL,
)
TOWERS = CLIP(vision=replace(CLIP().vision, **NARROW), text=replace(CLIP().text, **NARROW), projection_size=8, **SMALL)
SIDES = [(32, 32), (90, 20), (8, 8), (11, 40), (64, 48)]


def encoder(model: OmniVL | CLIP, batch_size: int) -> Encoder:
    torch.manual_seed(0)
    objectives = (UniVLC(), VLM(), LM()) if isinstance(model, OmniVL) else (UniVLC(),)
    chain = build_chain(model, objectives, TOKENIZER.special).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return Encoder(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size)


def shown(media: Media) -> PictureSet:
    random = np.random.default_rng(0)
    count = 1 if media == "image" else 6
    samples = [
        Sample(str(place), str(place), frames=random.integers(0, 256, (count, height, width, 3), dtype=np.uint8))
        for place, (width, height) in enumerate(SIDES)
    ]
    return PictureSet.of(samples, media, OMNIVL.inputs)


@pytest.mark.parametrize("media", ["image", "video"])
@pytest.mark.parametrize("model", [OMNIVL, TOWERS], ids=["omnivl", "clip"])
def test_embeddings(model: OmniVL | CLIP, media: Media) -> None:
    pictures = shown(media)
    together, alone = (encoder(model, size).pictures(pictures) for size in (len(SIDES), 1))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together @ together.t()).fill_diagonal_(0).max() < 0.999  # they are different


@pytest.mark.parametrize("media", ["image", "video"])
def test_matching_and_written_texts(media: Media) -> None:
    pictures, texts = shown(media), ["red cat", "a sun on a tree", "tree"]
    candidates = torch.tensor([[0, 1, 2]] * len(SIDES))
    together, alone = (
        encoder(OMNIVL, size).predict("vlm", pictures, texts, candidates) for size in (4 * len(SIDES), 1)
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    written = []
    for size in (len(SIDES), 1):
        own = encoder(OMNIVL, size)
        written.append(own.generate("lm", pictures, writing_search(own.writing("lm"), num_beams=2)))
    assert torch.equal(*written)


def test_a_picture_of_the_model_s_own_square_is_seen_as_before() -> None:
    """With fixed sizes and the same weights."""
    random = np.random.default_rng(1)
    frames = random.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    sample = Sample("a", "a", frames=frames)
    native, fixed = encoder(OMNIVL, 4), encoder(replace(OMNIVL, sizes="fixed"), 4)
    fixed.chain.load_state_dict(native.chain.state_dict())
    own, square = (one.pictures(PictureSet.of([sample], "image", one.model.inputs)) for one in (native, fixed))
    torch.testing.assert_close(own, square, rtol=1e-6, atol=1e-6)
