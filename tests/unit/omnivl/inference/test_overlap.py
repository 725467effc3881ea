"""Embeddings as vectors by which samples compare."""

from dataclasses import replace

import numpy as np
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import load_tokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.overlap import embeddings_of
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import UniVLC

TOKENIZER = load_tokenizer("emoji")
MODEL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "text_length": 12, "vocab_size": TOKENIZER.special.vocab_size},
)


def test_vectors_are_the_embeddings_and_broken_pictures_are_left_out() -> None:
    torch.manual_seed(0)
    chain = build_chain(MODEL, (UniVLC(),), TOKENIZER.special).eval()
    encoder = Encoder(chain, MODEL, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=4)
    pictures = PictureSet("emoji", "image", {"style": ("noto",)}, MODEL.inputs, 3, "media")
    vectors = embeddings_of(encoder, "image")
    with torch.no_grad():
        wanted = encoder.pictures(pictures).numpy()
    places, found = vectors(pictures.samples, True)
    assert places == [0, 1, 2]
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5)
    broken = Sample("b", "list:b", b"no picture", "png")
    places, found = vectors([pictures.samples[2], broken, pictures.samples[0]], False)
    assert places == [0, 2]
    np.testing.assert_allclose(found[:, 0], wanted[[2, 0]], rtol=1e-4, atol=1e-5)
    places, found = vectors([broken], False)
    assert (places, len(found)) == ([], 0)
