"""Encoding, matching and writing on a device equal the CPU's."""

from dataclasses import replace

import pytest
import torch

from omnivl.inference.generate import SearchOptions, generate
from omnivl.inference.predict import predict

CPU = torch.device("cpu")
OPTIONS = SearchOptions(start=4, end=2, pad=0, banned=(0, 1, 3, 4), max_length=8)


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_embeddings_and_matches(make_chain, make_batch, device, kind):
    chain, batch, rows = make_chain(torch.float32).eval(), make_batch(kind, 0), torch.tensor([2, 2, 0])
    found = []
    for where in (CPU, device):
        chain.to(where)
        frames, texts = batch.frames.to(where), batch.token_ids.to(where)
        matched = predict(chain, "vlm", frames, texts[:3], rows.to(where))
        found.append([tensor.cpu() for tensor in (chain.encode_visual(frames), chain.encode_text(texts), matched)])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_embeddings_are_normalised_fp32(make_chain, make_batch, device, dtype):
    chain, batch = make_chain(dtype).to(device).eval(), make_batch("image_text", 0)
    embedding = chain.encode_visual(batch.frames.to(device))
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(embedding), device=device))


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_the_same_on_any_device_and_with_a_cache(make_chain, make_batch, device, beams):
    chain, batch = make_chain(torch.float32).eval(), make_batch("image_text", 0)
    options = replace(OPTIONS, num_beams=beams)
    wanted = generate(chain, "lm", batch.frames, options)
    chain.to(device)
    for cached in (True, False):
        found = generate(chain, "lm", batch.frames.to(device), options, cached=cached)
        assert found.token_ids.device.type == device.type
        assert torch.equal(found.token_ids.cpu(), wanted.token_ids), cached
        torch.testing.assert_close(found.log_probability.cpu(), wanted.log_probability, rtol=1e-3, atol=1e-3)


def test_bf16_writes_without_an_end_that_is_not_allowed(make_chain, make_batch, device):
    chain, batch = make_chain(torch.bfloat16).to(device).eval(), make_batch("video_text", 0)
    found = generate(chain, "lm", batch.frames.to(device), OPTIONS)
    assert found.token_ids.shape == (6, 8)
    written = found.token_ids[found.token_ids != OPTIONS.pad]
    assert not set(written.tolist()) & set(OPTIONS.banned)
    assert torch.isfinite(found.log_probability).all()
