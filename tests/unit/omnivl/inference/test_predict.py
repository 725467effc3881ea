"""Predictions of heads: one entry for every objective that predicts, by its key."""

from dataclasses import replace

import pytest
import torch
from tiny_chain import CONFIG, TOKENS, make_batch

from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import caption_search, generate
from omnivl.inference.pictures import PictureSet
from omnivl.inference.predict import predict
from omnivl.objectives import LM, MLM, VLM, UniVLC


def make_chain(config=CONFIG, tokens=TOKENS, key=None):
    torch.manual_seed(0)
    return build_chain(config, (UniVLC(), MLM(), VLM(name=key), LM()), tokens).eval()


def test_a_key_names_the_head():
    batch = make_batch("image_text")
    wanted = predict(make_chain(), "vlm", batch.frames, batch.token_ids)
    assert wanted.shape == (4,)
    assert torch.equal(predict(make_chain(key="pairs"), "pairs", batch.frames, batch.token_ids), wanted)


@pytest.mark.parametrize("objective", ["univlc", "mlm", "vqa"])
def test_who_does_not_predict_is_named_with_those_who_do(objective):
    batch = make_batch("image_text")
    told = (
        rf"predict: got the objective '{objective}'; allowed are those of the stage that predict \('vlm', 'lm'\); "
        "name one of them, or use a stage that trains it"
    )
    with pytest.raises(UserError, match=told):
        predict(make_chain(), objective, batch.frames, batch.token_ids)
    with pytest.raises(UserError, match=told):
        generate(make_chain(), objective, batch.frames, caption_search(TOKENS, 4))


@pytest.fixture(scope="module")
def encoder():
    tokenizer = load_tokenizer("emoji")
    config = replace(CONFIG, vocab_size=tokenizer.special.vocab_size)
    chain = make_chain(config, tokenizer.special)
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return Encoder(chain, config, tokenizer, LocalGather(), torch.device("cpu"), batch_size=8)


@pytest.fixture(scope="module")
def pictures(encoder):
    return PictureSet("emoji", "image", {"style": ("twemoji",), "label": ("bugs",)}, encoder.model.inputs, 5)


@torch.no_grad()
def test_an_encoder_predicts_for_whole_sets(encoder, pictures):
    texts = pictures.captions
    candidates = torch.tensor([[0, 1, 4], [1, 0, 3], [2, 2, 1], [3, 4, 0], [4, 3, 2]])
    found = encoder.predict("vlm", pictures, texts, candidates)
    assert found.shape == (5, 3)
    assert len(found.unique()) > 10
    for i in range(5):
        own = encoder.token_ids([texts[j] for j in candidates[i]])
        alone = predict(encoder.chain, "vlm", pictures.frames([i, i, i]), own)
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.predict("vlm", pictures, texts), found[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_encoder_writes_for_whole_sets(encoder, pictures):
    search = caption_search(encoder.tokenizer.special, 6)
    found = encoder.generate("lm", pictures, search)
    assert torch.equal(found, generate(encoder.chain, "lm", pictures.frames(range(5)), search).token_ids)
    assert found.shape == (5, 6)
