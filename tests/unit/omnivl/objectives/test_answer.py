"""Answers written by a decoder that looks at the question's states: rows, loss, ranking, decoding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.architectures import ALBEF, BLIP2, Architecture, OmniVL, ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.demands import Demands, Join
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import lay_out, plan_layout
from omnivl.chain.pictures import Pictures
from omnivl.chain.positions import prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import ModelError, UserError
from omnivl.inference.generate import SearchOptions, generate
from omnivl.inference.rank import rank_answers
from omnivl.inference.written import looked_at
from omnivl.objectives import ITM, LM, MLM, Answer, Objective, PrepareContext
from omnivl.objectives.answer import cut_texts
from omnivl.parts import attention
from omnivl.parts.join import JoinRows
from omnivl.parts.sizes import Recompute, Transformer

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=20, num_reserved=5)
CONTEXT = PrepareContext(0, "test", TOKENS, (2, 2), 0)
MODEL = replace(
    OmniVL.presets["tiny"],
    hidden_size=16,
    num_heads=2,
    vision_layers=1,
    text_layers=1,
    alignment_layers=2,
    generation_layers=2,
    image_size=16,
    text_length=8,
    vocab_size=20,
    momentum=None,
)
ANSWER = Answer(most=2, length=5)
QUESTIONS = torch.tensor([[1, 7, 8, 2, 0, 0, 0, 0], [1, 9, 10, 11, 12, 2, 0, 0], [1, 13, 2, 0, 0, 0, 0, 0]])
ANSWERS = torch.tensor([[[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]], [[1, 8, 2, 0, 0], [0] * 5], [[1, 9, 10, 11, 2], [0] * 5]])
OPTIONS = SearchOptions(start=4, end=2, pad=0, banned=(1, 3, 4), max_length=4)


def make_batch(objectives: tuple[Objective, ...] = (ANSWER,)) -> Batch:
    own = torch.arange(3)
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8, generator=draw)
    token_ids = torch.zeros(3, 10, 5, dtype=torch.int64)
    token_ids[:, :2] = ANSWERS
    weights = torch.zeros(3, 10)
    weights[:, :2] = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.0]])
    fields = {
        "answers": (("a", "b"), ("c",), ("d",)),
        "answers/token_ids": token_ids,
        "weights": weights,
        "weights/present": weights > 0,
    }
    batch = Batch("image_text", frames, QUESTIONS, own, own, own, fields=fields)
    prepared = {name: value for one in objectives for name, value in one.prepare(batch, CONTEXT).items()}
    return replace(batch, prepared=prepared)


def make_chain(objectives: tuple[Objective, ...] = (ANSWER,), recompute: Recompute = "none"):
    torch.manual_seed(0)
    chain = build_chain(replace(MODEL, recompute=recompute), objectives, TOKENS).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return chain


def state_of(objectives: tuple[Objective, ...] = (ANSWER,)) -> State:
    return State.from_batch(make_batch(objectives), plan_layout(objectives, "image_text", 3, 1))


def one_answer_at_a_time(chain) -> torch.Tensor:
    """Log probabilities of the three questions' answers ``[3, 2]``, each computed alone without any padding."""
    frames, found = make_batch().frames, torch.zeros(3, 2)
    for row, question in enumerate(QUESTIONS):
        words = question[question != 0][None]
        demands = {"answer": Demands(joins={"answer/question": Join()})}
        layout = replace(lay_out(demands, "image_text", 1, 1, "predict"), objectives=())
        fused = chain.fold(State({"frames": frames[row : row + 1], "token_ids": words}, layout))["fused"]
        for place, answer in enumerate(ANSWERS[row]):
            if not answer.any():
                continue
            wanted = answer[answer != 0][1:]
            x = chain.embed.block.text(torch.cat([torch.tensor([4]), wanted[:-1]])[None], torch.float32)
            for layer in (chain.generation_00, chain.generation_01):
                x = layer.block(x, None, fused, None).y
            scores = F.log_softmax(chain.losses.vocabulary(x[0]), dim=-1)
            found[row, place] = scores[torch.arange(len(wanted)), wanted].sum()
    return found


def test_every_answer_is_a_row_with_its_weight():
    prepared = make_batch().prepared
    # The heavier answer first; a sample with one answer has a row without a target.
    assert prepared["answer/token_ids"].tolist() == [
        *([4, 7, 0, 0, 0], [4, 5, 6, 0, 0], [4, 8, 0, 0, 0], [4, 0, 0, 0, 0], [4, 9, 10, 11, 0], [4, 0, 0, 0, 0]),
    ]
    assert prepared["answer/targets"][:4].tolist() == [
        *([7, 2, -100, -100, -100], [5, 6, 2, -100, -100], [8, 2, -100, -100, -100], [-100] * 5),
    ]
    assert prepared["answer/weights"].tolist() == pytest.approx([0.7, 0.3, 1.0, 0.0, 0.5, 0.0])
    layout = plan_layout((ANSWER,), "image_text", 3, 1)
    assert layout.fused == {"answer/question": slice(0, 3)}
    assert layout.generation == {"answer": slice(0, 6)}
    assert layout.written_from == ("answer/question",)


def test_answers_that_are_listed_as_often_as_given_are_counted():
    batch = make_batch()
    raw = (("a", "b", "b", "b"), ("c", "c"), ("d",))
    fields = {"answers": raw, "answers/token_ids": batch.fields["answers/token_ids"]}
    prepared = ANSWER.prepare(replace(batch, fields=fields), CONTEXT)
    assert prepared["answer/weights"].tolist() == pytest.approx([0.75, 0.25, 1.0, 0.0, 1.0, 0.0])
    assert prepared["answer/token_ids"][0].tolist() == [4, 7, 0, 0, 0]


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_the_loss_is_that_of_answers_computed_one_by_one(recompute: Recompute):
    """So the decoder sees its own question only, whole and without padding, and each answer its earlier words."""
    chain = make_chain(recompute=recompute)
    made = chain(state_of())["loss"]
    alone = one_answer_at_a_time(make_chain())
    wanted = -(0.3 * alone[0, 0] + 0.7 * alone[0, 1] + alone[1, 0] + 0.5 * alone[2, 0]) / 3
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    made.backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([state_of().layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_questions_lie_behind_the_fused_rows_of_others():
    """Beside an objective with fused rows of its own the loss stays the same."""
    objectives: tuple[Objective, ...] = (ITM(alignment_weight=0.0), replace(ANSWER, name="first"), ANSWER)
    state = state_of(objectives)
    assert list(state.layout.fused) == ["itm", "first/question", "answer/question"]
    chain = make_chain(objectives)
    out = chain(state)
    torch.testing.assert_close(out["loss/answer"], out["loss/first"])
    alone = make_chain()
    alone.load_state_dict({name: value for name, value in chain.state_dict().items() if name in alone.state_dict()})
    torch.testing.assert_close(out["loss/answer"], alone(state_of())["loss/answer"])


def test_rows_look_at_the_fused_rows_of_their_sample():
    layout = plan_layout((ANSWER,), "image_text", 3, 1)
    state = State({"visual": torch.randn(3, 5, 16), "text": torch.randn(3, 8, 16), "text_mask": QUESTIONS != 0}, layout)
    assert JoinRows((ANSWER,))(state)["generation_memory"].tolist() == [0, 0, 1, 1, 2, 2]
    single = Answer(most=1, length=5)
    state.layout = plan_layout((single,), "image_text", 3, 1)
    assert "generation_memory" not in JoinRows((single,))(state)


def test_pictures_and_questions_are_not_looked_at_in_one_step():
    with pytest.raises(ModelError) as caught:
        plan_layout((LM(), ANSWER), "image_text", 3, 1)
    assert str(caught.value) == (
        "texts that 'lm' and 'answer' write in one step have different lengths; put the objectives into stages or data "
        "entries of their own"
    )


def test_texts_of_more_positions_are_cut_as_the_tokenizer_cuts_them() -> None:
    tokenizer = load_tokenizer("emoji")
    texts = ["heart", "face with tears of joy", "cat face with wry smile", "a"]
    long = torch.from_numpy(tokenizer.encode(texts, 12))
    for length in (3, 5, 6, 12):
        assert torch.equal(
            cut_texts(long, length, tokenizer.special), torch.from_numpy(tokenizer.encode(texts, length))
        )


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_equals_uncached(beams):
    chain, frames = make_chain(), make_batch().frames
    options = replace(OPTIONS, num_beams=beams)
    cached, uncached = (
        generate(chain, "answer", frames, options, token_ids=QUESTIONS, cached=cached) for cached in (True, False)
    )
    assert torch.equal(cached.token_ids, uncached.token_ids)
    torch.testing.assert_close(cached.log_probability, uncached.log_probability)
    assert len(cached.log_probability.unique()) == 3  # the images and questions matter


def test_padding_of_the_question_is_not_looked_at():
    chain, frames = make_chain(), make_batch().frames
    memory, mask = looked_at(chain, "answer", frames, QUESTIONS)
    assert mask.tolist() == (QUESTIONS != 0).tolist()
    longer = generate(chain, "answer", frames, OPTIONS, token_ids=QUESTIONS)
    shorter = generate(chain, "answer", frames[2:], OPTIONS, token_ids=QUESTIONS[2:, :3])
    torch.testing.assert_close(shorter.log_probability, longer.log_probability[2:])
    assert memory.shape == (3, 8, 16)


LIST = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 8, 2, 0, 0], [1, 9, 10, 11, 2], [1, 5, 2, 0, 0]])


def test_all_answers_are_ranked_by_their_log_probability():
    chain, frames = make_chain(), make_batch().frames
    alone = one_answer_at_a_time(chain)
    ranked = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS)
    assert ranked.shape == (3, 5)
    torch.testing.assert_close(ranked[0, :2], alone[0])
    torch.testing.assert_close(ranked[[1, 2], [2, 3]], alone[[1, 2], [0, 0]])


def test_questions_about_sets_of_pictures():
    """What is learnt of a set is what its answers are ranked by, and the order of its pictures matters."""
    single = Answer(most=1, length=5)
    chain, batch = make_chain((single,)), make_batch((single,))
    chain.embed.block.visual.times.data.normal_()
    draw = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8, generator=draw)
    layout = plan_layout((single,), "images_text", 3, 4)
    out = chain(State.from_batch(replace(batch, kind="images_text", frames=frames), layout))
    sets = Pictures(frames, are_sets=True)
    ranked = rank_answers(chain, "answer", sets, QUESTIONS, LIST, TOKENS)
    wanted = -(0.7 * ranked[0, 1] + ranked[1, 2] + 0.5 * ranked[2, 3]) / 3
    torch.testing.assert_close(out["loss"], wanted)
    turned = Pictures(frames.flip(1), are_sets=True)
    assert not torch.allclose(ranked, rank_answers(chain, "answer", turned, QUESTIONS, LIST, TOKENS))
    written = generate(chain, "answer", sets, OPTIONS, token_ids=QUESTIONS)
    assert written.token_ids.shape == (3, 4)


def albef_ranking(chain, frames, k):
    """``rank_answer`` of ALBEF's models/model_vqa.py with this decoder's losses: the answers' ids, best first."""
    scores = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS)
    first = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS, first_token_twice=True) - scores
    probabilities, ids = first.exp().topk(k, dim=1)
    log_probabilities = torch.stack([probabilities.log(), scores.gather(1, ids)], dim=-1).sum(-1)
    return ids.gather(1, log_probabilities.softmax(-1).topk(k, dim=1).indices)


def test_only_the_likeliest_first_tokens_are_looked_at():
    chain, frames = make_chain(), make_batch().frames
    whole = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS)
    few = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS, candidates=2)
    assert few.isfinite().sum(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(few[few.isfinite()], whole[few.isfinite()])
    # The first token's log probability, from the decoder's first step.
    twice = rank_answers(chain, "answer", frames, QUESTIONS, LIST, TOKENS, first_token_twice=True)
    step = generate(chain, "answer", frames, replace(OPTIONS, max_length=1, banned=()), token_ids=QUESTIONS)
    first = twice - whole
    torch.testing.assert_close(first[:, 0], first[:, 4])  # both begin with 5
    assert bool((first <= step.log_probability[:, None] + 1e-5).all())
    kept = first.topk(2, dim=1).values.amin(1, keepdim=True)
    assert bool((first[few.isfinite()].view(3, 2) >= kept - 1e-6).all())
    for row, order in zip(twice, albef_ranking(chain, frames, 5), strict=True):
        assert row.argsort(descending=True).tolist() == order.tolist()


def test_without_a_question_it_writes_nothing():
    with pytest.raises(UserError) as caught:
        generate(make_chain(), "answer", make_batch().frames, OPTIONS)
    assert str(caught.value) == (
        "generate: got no text for the objective 'answer', which writes about images with texts; allowed is one text "
        "for each image, such as its question; give token_ids"
    )


def test_losses_fall():
    chain = make_chain().train()
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out = chain(state_of())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.4 * losses[0]


def test_operations_are_what_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts products, but not its fused attention on the CPU.
    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = build_chain(MODEL, (ANSWER,), TOKENS)
    state = state_of()
    full = {"token_ids": QUESTIONS.masked_fill(QUESTIONS == 0, 9)}
    full["answer/token_ids"] = state["answer/token_ids"].masked_fill(state["answer/token_ids"] == 0, 9)
    full |= prepared_targets("answer", torch.full_like(state["answer/targets"], 9))
    state = State({**state, **full}, state.layout)
    with FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(chain_flops(chain, state.layout), rel=1e-6)


def test_it_says_what_does_not_fit():
    assert [str(one) for one in Answer(length=9).misfits(MODEL.inputs, 4)] == [
        "length: got 9; allowed at most 8, the model's text length; change either"
    ]
    with pytest.raises(UserError, match="objective answer: length must be at least 3: the start, a token and the end"):
        Answer(length=2)
    with pytest.raises(UserError, match="objective answer: most must be at least 1, got 0"):
        Answer(most=0)


def test_questions_may_share_a_step_with_masked_words():
    objectives: tuple[Objective, ...] = (MLM(probability=0.5), ANSWER)
    out = make_chain(objectives)(state_of(objectives))
    assert out.named("loss").keys() == {"mlm", "answer"}


@pytest.mark.parametrize("kind", [BLIP2, ViLT])
def test_decoders_that_look_at_pictures_alone_are_refused(kind: type[Architecture]):
    with pytest.raises(ModelError, match="objective 'answer' asks for the stream 'fused_generation'; architecture"):
        build_chain(kind(), (ANSWER,), TOKENS)


@pytest.mark.parametrize("vision", [16, 24])
def test_albefs_decoder_is_as_wide_as_the_texts_that_it_looks_at(vision: int):
    model = ALBEF(
        vision=Transformer(hidden_size=vision, num_heads=2, layers=1),
        text=Transformer(hidden_size=16, num_heads=2, layers=1, norm="post"),
        fusion=Transformer(hidden_size=16, num_heads=2, layers=1, norm="post"),
        generation_layers=1,
        **{"image_size": 16, "patch_size": 8, "text_length": 8, "vocab_size": 20, "projection_size": 8},
    )
    torch.manual_seed(0)
    chain = build_chain(model, (ANSWER,), TOKENS)
    state = state_of()
    chain(state)["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([state.layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name
