"""Prefix language modelling: where texts are split, worked by hand; its loss is tested with its architecture."""

import pytest
import torch
from small_clip import TOKENS, make_batch

from omnivl.data.tokenizer import TextReader, load_tokenizer
from omnivl.errors import UserError
from omnivl.objectives import PrepareContext, SplitLM
from omnivl.objectives.split_lm import split

CLS, SEP, PAD = TOKENS.cls, TOKENS.sep, TOKENS.pad


def test_a_text_of_four_words_is_split_at_each_place():
    text = torch.tensor([[CLS, 5, 6, 7, 8, SEP, PAD, PAD]] * 3)
    first, rest = split(text, torch.tensor([0, 1, 4]), TOKENS)
    assert first.tolist() == [
        [CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD],
        [CLS, 5, SEP, PAD, PAD, PAD, PAD, PAD],
        [CLS, 5, 6, 7, 8, SEP, PAD, PAD],
    ]
    assert rest.tolist() == [
        [CLS, 5, 6, 7, 8, SEP, PAD, PAD],
        [CLS, 6, 7, 8, SEP, PAD, PAD, PAD],
        [CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD],
    ]


def test_what_fills_its_row_is_split_too():
    text = torch.tensor([[CLS, 5, 6, SEP]])
    first, rest = split(text, torch.tensor([2]), TOKENS)
    assert (first.tolist(), rest.tolist()) == ([[CLS, 5, 6, SEP]], [[CLS, SEP, PAD, PAD]])


def test_places_are_drawn_by_the_sample_s_position():
    """Evenly from 0 to n words; a half of them at most where the plan says so."""
    counts, halves = torch.zeros(7), torch.zeros(7)
    objective, half = SplitLM(), SplitLM(most=0.5)
    for seed in range(200):
        batch = make_batch(size=4)
        context = PrepareContext(seed, "test", TOKENS, (2, 2), 0)
        made = objective.prepare(batch, context)
        again = objective.prepare(batch, context)
        assert all(torch.equal(made[name], again[name]) for name in made)
        for count, one in ((counts, made), (halves, half.prepare(batch, context))):
            ids = one["split_lm/beginning/token_ids"][0]  # of six words
            count[int((ids != PAD).sum()) - 2] += 1
    assert counts.min() > 10
    assert halves[4:].sum() == 0
    assert halves[:4].min() > 20


def test_targets_are_what_the_encoder_has_not_read():
    batch, objective = make_batch(size=4), SplitLM()
    made = objective.prepare(batch, PrepareContext(0, "test", TOKENS, (2, 2), 0))
    for row in range(4):
        whole = [one for one in batch.token_ids[row].tolist() if one != PAD]
        beginning = [one for one in made["split_lm/beginning/token_ids"][row].tolist() if one != PAD]
        targets = [one for one in made["split_lm/targets"][row].tolist() if one != -100]
        assert [*beginning[:-1], *targets] == whole
        assert made["split_lm/token_ids"][row, 0] == TOKENS.decode


def test_a_prompt_stands_before_every_beginning():
    batch, tokenizer = make_batch(size=4), load_tokenizer("emoji")
    reader = TextReader(tokenizer, 8)
    given = reader.words("red cat")
    context = PrepareContext(0, "test", TOKENS, (2, 2), 0, readers={"text": reader})
    plain = SplitLM().prepare(batch, context)
    made = SplitLM(prompt="red cat").prepare(batch, context)
    assert SplitLM(prompt="red cat").needs_whole_texts
    for name in ("split_lm/token_ids", "split_lm/targets"):
        assert torch.equal(made[name], plain[name])
    for row in range(4):
        before = [one for one in plain["split_lm/beginning/token_ids"][row].tolist() if one != PAD]
        wanted = [CLS, *given, *before[1:]]
        wanted = wanted if len(wanted) <= 8 else [*wanted[:7], SEP]  # what does not fit is cut
        assert [one for one in made["split_lm/beginning/token_ids"][row].tolist() if one != PAD] == wanted


@pytest.mark.parametrize(("option", "allowed"), [("most", "0 to 1"), ("label_smoothing", "at least 0 and below 1")])
def test_options_out_of_range_are_refused(option, allowed):
    with pytest.raises(UserError, match=f"objective split_lm: {option} must be {allowed}, got 2.0"):
        SplitLM(**{option: 2.0})
