"""Decoding: cached equals uncached, causality, and beam search against brute force."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.special_tokens import SpecialTokens
from omnivl.inference.generate import ChainDecoder, SearchOptions, beam_search, generate
from omnivl.objectives import LM

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=20, num_reserved=5)
CONFIG = replace(
    OmniVL.presets["tiny"],
    hidden_size=16,
    num_heads=2,
    vision_layers=1,
    text_layers=1,
    alignment_layers=1,
    generation_layers=2,
    image_size=16,
    text_length=8,
    vocab_size=20,
    momentum=None,
)
OPTIONS = SearchOptions(start=4, end=2, pad=0, banned=(1, 3, 4), max_length=6)


@pytest.fixture
def chain():
    torch.manual_seed(0)
    chain = build_chain(CONFIG, (LM(),), TOKENS).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return chain


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_equals_uncached(chain, frames, beams):
    options = replace(OPTIONS, num_beams=beams)
    cached, uncached = (generate(chain, "lm", frames, options, cached=cached) for cached in (True, False))
    assert torch.equal(cached.token_ids, uncached.token_ids)
    torch.testing.assert_close(cached.log_probability, uncached.log_probability)
    assert len(cached.log_probability.unique()) == 3  # the images matter
    assert not set(cached.token_ids.flatten().tolist()) & {1, 3, 4}


def test_cached_logits_equal_the_training_pass(chain, frames):
    texts = torch.tensor([[4, 7, 8, 9], [4, 10, 11, 12], [4, 13, 14, 15]])
    decoder = ChainDecoder(chain, "lm", chain.features(frames), num_beams=1)
    stepwise = [decoder(texts[:, : end + 1], torch.arange(3) if end else None) for end in range(4)]
    layout = plan_layout((LM(),), "image_text", 3, 1)
    state = State({"frames": frames, "lm/token_ids": texts}, layout)
    for layer in chain.layers[:-1]:
        state = layer(state)
    wanted = chain.losses.vocabulary(state["generation"])
    torch.testing.assert_close(torch.stack(stepwise, dim=1), wanted, rtol=1e-5, atol=1e-5)


def test_later_words_do_not_change_earlier_ones(chain, frames):
    layout = plan_layout((LM(),), "image_text", 3, 1)
    streams = []
    for last in (9, 12):
        texts = torch.tensor([[4, 7, 8, last]] * 3)
        state = State({"frames": frames, "lm/token_ids": texts}, layout)
        for layer in chain.layers[:-1]:
            state = layer(state)
        streams.append(state["generation"])
    assert torch.equal(streams[0][:, :3], streams[1][:, :3])
    assert not torch.allclose(streams[0][:, 3], streams[1][:, 3])


def chances(prefix):
    """A made-up language of the words a = 1 and b = 2 and the end 3: logits by the words so far."""
    table = {
        (): [0.5, 0.4, 0.1],
        (1,): [0.34, 0.33, 0.33],
        (2,): [0.05, 0.05, 0.9],
        (1, 1): [0.4, 0.4, 0.2],
        (1, 2): [0.4, 0.4, 0.2],
    }
    return [0.0, *table.get(prefix, [0.2, 0.2, 0.6]), 0.0]


class Language:
    """``chances`` as NextToken; checks that parents are told rightly."""

    def __init__(self):
        self.previous = None

    def __call__(self, token_ids, parents):
        if parents is not None:
            assert torch.equal(self.previous[parents], token_ids[:, :-1])
        self.previous = token_ids
        rows = [chances(tuple(row[1:])) for row in token_ids.tolist()]
        return torch.tensor(rows).clamp(min=1e-9).log()


LANGUAGE = SearchOptions(start=4, end=3, pad=0, banned=(4,), max_length=3)


def best_by_brute_force(length_penalty):
    """All texts up to three words, each ended or cut at three."""
    found = {}
    for length in (1, 2, 3):
        for words in itertools.product((1, 2, 3), repeat=length):
            if 3 in words[:-1] or (length < 3 and words[-1] != 3):
                continue
            steps = [chances(words[:i])[word] for i, word in enumerate(words)]
            found[words] = sum(math.log(step) for step in steps) / length**length_penalty
    return max(found, key=found.get), max(found.values())


def test_greedy_falls_for_the_first_word_and_beams_do_not():
    greedy = beam_search(Language(), 1, LANGUAGE, torch.device("cpu"))
    # 0.5 x 0.34 x 0.4 = 0.068
    assert greedy.token_ids[0, :2].tolist() == [1, 1]
    assert greedy.log_probability.exp().item() == pytest.approx(0.068, rel=1e-4)
    found = beam_search(Language(), 2, replace(LANGUAGE, num_beams=4), torch.device("cpu"))
    words, score = best_by_brute_force(0.0)
    assert words == (2, 3)
    # 0.4 x 0.9 = 0.36
    assert found.token_ids.tolist() == [[2, 3, 0]] * 2
    assert found.log_probability[0].item() == pytest.approx(score, rel=1e-4)
    assert score == pytest.approx(math.log(0.36))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_wide_beams_find_the_optimum(length_penalty):
    options = replace(LANGUAGE, num_beams=16, length_penalty=length_penalty)
    found = beam_search(Language(), 1, options, torch.device("cpu"))
    words, score = best_by_brute_force(length_penalty)
    own = [word for word in found.token_ids[0].tolist() if word]
    assert found.log_probability.item() / len(own) ** length_penalty == pytest.approx(score, rel=1e-4)
    assert len(own) == len(words)


def test_stops_early_only_when_asked():
    class Ending:
        calls = 0

        def __call__(self, token_ids, parents):
            self.calls += 1
            return torch.tensor([0.0, 0, 0, 9, 0]).expand(len(token_ids), 5)

    for gather, calls in ((LocalGather(), 1), (None, 3)):
        language = Ending()
        found = beam_search(language, 2, LANGUAGE, torch.device("cpu"), gather)
        assert language.calls == calls
        assert found.token_ids.tolist() == [[3, 0, 0]] * 2
