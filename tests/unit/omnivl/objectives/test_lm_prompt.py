"""Captions behind a prompt: given in training and in writing, never predicted."""

import numpy as np
import pytest
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.positions import IGNORED
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import Batch
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import TextReader, WordPieceTokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import generate, writing_search
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import LM
from omnivl.tasks.captions import write_captions

WORDS = ["a", "picture", "of", "red", "cat", "sun"]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS])
A, PICTURE, OF, RED, CAT, SUN = range(6, 12)
PAD, SEP, DEC = 0, 3, 5
MODEL = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 2, "image_size": 16, "video_size": 16, "num_frames": 2, "patch_size": 8},
    **{"text_length": 8, "vocab_size": 12, "projection_size": 8, "momentum": None},
)
READERS = {"text": TextReader(TOKENIZER, 8)}


def prepared(objective: LM, *captions: str) -> dict[str, torch.Tensor]:
    own = torch.arange(len(captions))
    ids = torch.from_numpy(READERS["text"].encode(captions))
    batch = Batch("image_text", None, ids, own, own, own, captions=captions)
    return Preparation((objective,), TOKENIZER.special, MODEL.inputs, 0, READERS)(batch, "entry", 0)


def test_the_prompt_is_given_and_not_predicted() -> None:
    made = prepared(LM(prompt="a picture of"), "red cat", "a red cat a red cat a red")
    assert made["lm/token_ids"].tolist() == [
        [DEC, A, PICTURE, OF, RED, CAT, PAD, PAD],
        [DEC, A, PICTURE, OF, A, RED, CAT, PAD],
    ]
    none = [IGNORED] * 3
    assert made["lm/targets"].tolist() == [[*none, RED, CAT, SEP, IGNORED, IGNORED], [*none, A, RED, CAT, SEP, IGNORED]]
    assert LM(prompt="a").needs_whole_texts and not LM().needs_whole_texts
    plain = prepared(LM(), "red cat")
    assert plain["lm/token_ids"].tolist() == [[DEC, RED, CAT, *[PAD] * 5]]


def encoder(objective: LM) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(MODEL, (objective,), TOKENIZER.special).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return Encoder(chain, MODEL, TOKENIZER, LocalGather(), torch.device("cpu"), 4)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_written_behind_the_prompt_as_long_as_wanted(beams: int) -> None:
    objective = LM(prompt="a picture of")
    own = encoder(objective)
    writing = own.writing("lm")
    assert (writing.given, writing.end, writing.max_length) == ((DEC, A, PICTURE, OF), SEP, 4)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 1, 3, 16, 16), dtype=np.uint8))
    cached, whole = (
        generate(own.chain, "lm", frames, writing_search(writing, beams), cached=kept).token_ids
        for kept in (True, False)
    )
    assert torch.equal(cached, whole)
    assert cached.shape == (3, 4)
    short = writing_search(writing, beams, 2)
    assert short.max_length == 2
    assert writing_search(writing, beams, 99).max_length == 4
    pictures = PictureSet.of(
        [Sample(str(place), str(place), frames=one.permute(0, 2, 3, 1).numpy()) for place, one in enumerate(frames)],
        "image",
        MODEL.inputs,
    )
    texts = write_captions(pictures, own, "lm", beams, 2)
    assert all(len(text.split()) <= 2 for text in texts)
