"""Beam search beside that of transformers, on a random model that likes to end."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from omnivl.errors import UserError
from omnivl.inference.search import SearchOptions, beam_search

SAMPLES, WORDS, PAD, END, START = 64, 24, 24, 25, 26
FIRST = 27  # each sample begins with a token of its own, so that it has a language of its own
LONGEST = 10
OPTIONS = SearchOptions(START, END, PAD, (START, *range(FIRST, FIRST + SAMPLES)), LONGEST)
CPU = torch.device("cpu")


class Peer(GPT2LMHeadModel):
    """A language model that ends readily, and never writes padding, the start or a first token."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., END] += 1.5
        out.logits[..., [PAD, START, *range(FIRST, FIRST + SAMPLES)]] = float("-inf")
        return out


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    config = GPT2Config(vocab_size=FIRST + SAMPLES, n_embd=32, n_layer=2, n_head=2, n_positions=32, **ends)
    model = Peer(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.25)
    return model


def ours(peer, options):
    def next_token(texts, parents):
        first = torch.arange(FIRST, FIRST + SAMPLES).repeat_interleave(options.num_beams)
        return peer(torch.cat([first[:, None], texts], dim=1)).logits[:, -1]

    return beam_search(next_token, SAMPLES, options, CPU)


def theirs(peer, options, prompt=()):
    given = torch.tensor([[one, START, *prompt] for one in range(FIRST, FIRST + SAMPLES)])
    out = peer.generate(
        given,
        attention_mask=torch.ones_like(given),
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        max_new_tokens=options.max_length,
        min_new_tokens=options.min_length or None,
        repetition_penalty=options.repetition_penalty,
        do_sample=False,
    )[:, given.shape[1] :]
    return torch.nn.functional.pad(out, (0, options.max_length - out.shape[1]), value=PAD)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, 0.5, -1.0])
def test_every_text_equals(peer, beams, length_penalty):
    options = replace(OPTIONS, num_beams=beams, length_penalty=length_penalty)
    found = ours(peer, options).token_ids
    assert torch.equal(found, theirs(peer, options))
    assert len({tuple(row) for row in found.tolist()}) > SAMPLES // 4, "texts differ"
    assert len({int((row != PAD).sum()) for row in found}) > 2, "and their lengths"


@pytest.mark.parametrize(
    ("beams", "length_penalty", "least", "penalty"),
    list(itertools.product([1, 4], [0.0, 1.0, 2.0], [0, 4], [1.0, 1.5, 0.7])),
)
def test_with_a_least_length_and_a_penalty_for_repetition(peer, beams, length_penalty, least, penalty):
    options = replace(
        OPTIONS, num_beams=beams, length_penalty=length_penalty, min_length=least, repetition_penalty=penalty
    )
    found = ours(peer, options).token_ids
    assert torch.equal(found, theirs(peer, options))
    assert not (found[:, :least] == END).any()


def test_with_a_prompt(peer):
    options = replace(OPTIONS, num_beams=3, length_penalty=1.0, prompt=(3, 5))
    assert torch.equal(ours(peer, options).token_ids, theirs(peer, options, (3, 5)))


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_that_is_the_end(peer, beams):
    """The end is still written."""
    options = replace(OPTIONS, num_beams=beams, length_penalty=1.0)
    apart = ours(peer, options).token_ids
    same = ours(peer, replace(options, pad=END, banned=(*options.banned, PAD))).token_ids
    assert torch.equal(same, torch.where(apart == PAD, END, apart))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_log_probability_is_that_of_the_text(peer, beams):
    found = ours(peer, replace(OPTIONS, num_beams=beams, length_penalty=1.0))
    first = torch.arange(FIRST, FIRST + SAMPLES)[:, None]
    whole = torch.cat([first, torch.full_like(first, START), found.token_ids], dim=1)
    steps = peer(whole).logits[:, 1:-1].log_softmax(-1).gather(2, found.token_ids[..., None])[..., 0]
    wanted = steps.where(found.token_ids != PAD, 0.0).sum(1)
    torch.testing.assert_close(found.log_probability, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_beams", 0, "1 or more"),
        ("max_length", 0, "1 or more"),
        ("min_length", 11, "0 to 10"),
        ("min_length", -1, "0 to 10"),
        ("length_penalty", float("nan"), "-100 to 100"),
        ("repetition_penalty", 0.0, "above 0, up to 100"),
        ("repetition_penalty", -1.0, "above 0, up to 100"),
    ],
)
def test_numbers_outside_of_their_range(field, value, allowed):
    with pytest.raises(UserError) as error:
        replace(OPTIONS, **{field: value})
    assert str(error.value) == f"generate: {field}: got {value}; allowed {allowed}; change it"
