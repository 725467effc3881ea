"""MLM, LM and the vocabulary head that they share."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.positions import IGNORED
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DATA_KINDS, Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader, load_tokenizer
from omnivl.errors import UserError
from omnivl.objectives import LM, MLM, PrepareContext
from omnivl.objectives.lm import shift
from omnivl.objectives.mlm import Ids, first_of_word, ordinary_ids
from omnivl.objectives.vocabulary import Teacher, token_loss
from omnivl.parts.heads import VocabularyHead
from omnivl.randomness import generator

SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 0, "image_size": 16, "video_size": 16, "text_length": 5, "vocab_size": 30},
}


def flat_head(hidden_size: int, bias: list[float]) -> VocabularyHead:
    """Logits are the decoder's bias, whatever goes in."""
    head = VocabularyHead(hidden_size, len(bias))
    torch.nn.init.zeros_(head.decoder.weight)
    assert head.decoder.bias is not None
    head.decoder.bias.data = torch.tensor(bias)
    return head


def corrupt(objective: MLM, random: np.random.Generator, token_ids: Ids, tokens: SpecialTokens) -> tuple[Ids, Ids]:
    """One text hidden, from the generator's first draws."""
    draws = random.random((1, 1 + 3 * token_ids.size))
    corrupted, targets = objective.hide(draws, token_ids[None], tokens)
    return corrupted[0], targets[0]


def test_special_and_reserved_tokens_are_never_hidden(tokens: SpecialTokens) -> None:
    # 4 is reserved, 29 is [DEC] although it lies behind the reserved ids.
    token_ids = np.array([1, 4, 5, 3, 29, 28, 2, 0])
    for seed in range(30):
        corrupted, targets = corrupt(MLM(probability=1.0), generator(seed), token_ids, tokens)
        assert targets.tolist() == [IGNORED, IGNORED, 5, IGNORED, IGNORED, 28, IGNORED, IGNORED]
        assert corrupted[[0, 1, 3, 4, 6, 7]].tolist() == [1, 4, 3, 29, 2, 0]


def test_hiding_by_hand(tokens: SpecialTokens) -> None:
    # Columns of a position: hidden below 0.15, then [MASK] below 0.8, kept below 0.9, else replaced by a random one of
    # the 24 ids 5 .. 28: 0.5 * 24 = 12, id 17. The special ends stay, whatever their draws.
    text = np.array([[1, 6, 7, 8, 2], [1, 6, 7, 8, 2]])
    hidden, passed = (0.0, 0.0, 0.0), (0.15, 0.0, 0.0)
    first = [0.0, *hidden, *(0.14, 0.79, 0.5), *(0.1, 0.8, 0.5), *(0.1, 0.9, 0.5), *hidden]
    # No token of the second text is drawn: 0.7 * 3 = 2.1 is the last of its three, and its other draws say [MASK].
    second = [0.7, *hidden, *passed, *passed, *passed, *hidden]
    corrupted, targets = MLM().hide(np.array([first, second]), text, tokens)
    assert corrupted.tolist() == [[1, tokens.mask, 7, 17, 2], [1, 6, 7, tokens.mask, 2]]
    assert targets.tolist() == [[IGNORED, 6, 7, 8, IGNORED], [IGNORED, IGNORED, IGNORED, 8, IGNORED]]


def test_only_tokens_of_some_words_are_hidden(context: PrepareContext, tmp_path: Path) -> None:
    """A word of two tokens may lose either; a text without any of the words keeps all, and has no target."""
    reader = TextReader(load_tokenizer("emoji"), 16)
    listed = tmp_path / "words.txt"
    listed.write_text("cat\ndax\n")
    objective = MLM(probability=1.0, mask_share=1.0, random_share=0.0, words=str(listed))
    assert objective.words == ("cat", "dax") and objective == replace(objective, words=("cat", "dax"))
    texts = ["this is a cat.", "this is a dax. it is a cat.", "this is a dog."]
    token_ids, special = torch.from_numpy(reader.encode(texts)), reader.tokenizer.special
    own = torch.arange(3)
    batch = Batch("text", None, token_ids, own, own, own, captions=tuple(texts))
    prepared = replace(objective, grounded=False).prepare(
        batch, replace(context, tokens=special, readers={"text": reader})
    )
    wanted = torch.isin(token_ids, torch.tensor([*reader.words("cat"), *reader.words("dax")]))
    assert wanted.sum(1).tolist() == [1, 3, 0]
    assert torch.equal(prepared["mlm/targets"] != IGNORED, wanted)
    assert torch.equal(prepared["mlm/token_ids"] == special.mask, wanted)
    everything = MLM(probability=1.0, grounded=False).prepare(batch, replace(context, tokens=special))
    assert (everything["mlm/targets"] != IGNORED).sum() > wanted.sum()
    with pytest.raises(
        UserError, match=r"objective mlm: words\.1 is 'cat' a second time; allowed is each once; remove it"
    ):
        MLM(words=("cat", "cat"))


def test_shares_of_masked_replaced_and_kept(tokens: SpecialTokens) -> None:
    token_ids = np.full(20_000, 10)
    corrupted, targets = corrupt(MLM(), generator(0), token_ids, tokens)
    chosen = targets != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.01)
    assert (targets[chosen] == 10).all()
    assert (corrupted[~chosen] == 10).all()
    put_in = corrupted[chosen]
    assert (put_in == tokens.mask).mean() == pytest.approx(0.8, abs=0.02)
    # A random token out of 24 (5 .. 28) is the old one once in 24 times: 0.1 + 0.1 / 24 stay.
    assert (put_in == 10).mean() == pytest.approx(0.1 + 0.1 / 24, abs=0.02)
    assert set(put_in[put_in != tokens.mask]) == set(range(5, 29))


def test_shares_can_be_all_random_or_all_kept(tokens: SpecialTokens) -> None:
    token_ids = np.full(500, 10)
    kept, _ = corrupt(MLM(probability=1.0, mask_share=0.0, random_share=0.0), generator(0), token_ids, tokens)
    assert (kept == 10).all()
    replaced, _ = corrupt(MLM(probability=1.0, mask_share=0.0, random_share=1.0), generator(0), token_ids, tokens)
    assert not (replaced == tokens.mask).any()
    assert (replaced != 10).mean() > 0.9


def test_ordinary_ids_leave_out_what_is_special(tokens: SpecialTokens) -> None:
    assert ordinary_ids(tokens).tolist() == list(range(5, 29))


def test_at_least_one_token_is_hidden_where_there_is_one(tokens: SpecialTokens) -> None:
    for seed in range(50):
        _, targets = corrupt(MLM(probability=1e-6), generator(seed), np.array([1, 6, 7, 2, 0]), tokens)
        assert (targets != IGNORED).sum() == 1
    corrupted, targets = corrupt(MLM(), generator(0), np.array([1, 2, 0, 0]), tokens)
    assert (targets == IGNORED).all()
    assert corrupted.tolist() == [1, 2, 0, 0]


def test_draws_do_not_depend_on_padding_or_neighbours(tokens: SpecialTokens, make_batch, context) -> None:
    text = np.array([1, 6, 7, 8, 9, 10, 11, 2])
    short = corrupt(MLM(probability=0.5), generator(3), text, tokens)
    long = corrupt(MLM(probability=0.5), generator(3), np.concatenate([text, np.zeros(5, dtype=np.int64)]), tokens)
    assert all(np.array_equal(a, b[:8]) for a, b in zip(short, long, strict=True))
    joined = MLM().prepare(make_batch(positions=(4, 5, 6, 7)), context)
    split = [MLM().prepare(make_batch(positions=p), context) for p in ((4, 5), (6, 7))]
    for key in ("mlm/token_ids", "mlm/targets"):
        assert torch.equal(joined[key], torch.cat([part[key] for part in split]))


def test_prepare_leaves_the_batch_alone(make_batch, context) -> None:
    batch = make_batch()
    before = batch.token_ids.clone()
    MLM(probability=1.0).prepare(batch, context)
    LM().prepare(batch, context)
    assert torch.equal(batch.token_ids, before)


def test_lm_shifts_by_one(tokens: SpecialTokens) -> None:
    # [CLS] 5 6 [SEP] pad, and a text that fills its row.
    token_ids = torch.tensor([[1, 5, 6, 2, 0], [1, 5, 6, 7, 2]])
    inputs, targets = shift(token_ids, tokens)
    assert inputs.tolist() == [[29, 5, 6, 0, 0], [29, 5, 6, 7, 0]]
    assert targets.tolist() == [[5, 6, 2, IGNORED, IGNORED], [5, 6, 7, 2, IGNORED]]


def test_token_loss_and_gradient_by_hand() -> None:
    # Uniform over 4 tokens: each of the three targets costs ln 4. d loss / d bias = 1/4 - share of the target:
    # targets 1, 1, 3 -> 1/4 - (0, 2/3, 0, 1/3).
    head = flat_head(3, [0.0] * 4)
    targets = torch.tensor([[1, IGNORED], [1, 3]])
    out = token_loss(torch.randn(2, 2, 3), targets, head, LocalGather())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(4))
    assert head.decoder.bias is not None
    torch.testing.assert_close(head.decoder.bias.grad, torch.tensor([1 / 4, 1 / 4 - 2 / 3, 1 / 4, 1 / 4 - 1 / 3]))


def test_accuracy_by_hand() -> None:
    # The head always says 1: right for two targets of three.
    head = flat_head(3, [0.0, 1.0, 0.0, 0.0])
    out = token_loss(torch.randn(2, 2, 3), torch.tensor([[1, IGNORED], [1, 3]]), head, LocalGather())
    assert out.metrics["accuracy"].item() == pytest.approx(2 / 3)


def test_label_smoothing_by_hand() -> None:
    # Logits (ln 3, 0): probabilities 3/4, 1/4. Smoothing 0.2 puts 0.9 on the target 0 and 0.1 on the other:
    # 0.9 ln(4/3) + 0.1 ln 4.
    head = flat_head(3, [math.log(3), 0.0])
    out = token_loss(torch.randn(1, 1, 3), torch.tensor([[0]]), head, LocalGather(), label_smoothing=0.2)
    assert out.loss.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_only_positions_with_a_target_go_through_the_head() -> None:
    head, seen = VocabularyHead(3, 7), []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    hidden = torch.randn(2, 2, 3, requires_grad=True)
    token_loss(hidden, torch.tensor([[1, IGNORED], [1, 3]]), head, LocalGather()).loss.backward()
    assert seen == [(3, 3)]
    assert hidden.grad is not None
    assert hidden.grad[0, 1].abs().sum() == 0


def test_no_target_gives_zero_and_zero_gradients() -> None:
    """A replica without a masked token still runs its head: sharding hosts need the same modules on every rank."""
    head = VocabularyHead(3, 7)
    out = token_loss(torch.randn(1, 2, 3), torch.full((1, 2), IGNORED), head, LocalGather())
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.metrics["accuracy"].item() == 0.0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0


def test_mlm_reads_its_fused_rows_and_lm_the_generation_stream() -> None:
    head = VocabularyHead(3, 7)
    targets = torch.tensor([[1, IGNORED], [IGNORED, 3]])
    hidden = torch.randn(2, 2, 3)
    fused, heads = {"other": slice(0, 1), "mlm": slice(1, 3)}, Heads(vocabulary=head)
    layout = StepLayout("image_text", 2, 1, fused=fused, generation={"lm": slice(0, 2)})
    state = State({"fused": torch.cat([torch.randn(1, 2, 3), hidden]), "mlm/targets": targets}, layout)
    expected = token_loss(hidden, targets, head, LocalGather()).loss
    assert torch.equal(MLM().loss(state, heads, LocalGather()).loss, expected)
    state = State({"generation": hidden, "lm/targets": targets}, layout)
    assert torch.equal(LM(label_smoothing=0.0).loss(state, heads, LocalGather()).loss, expected)
    smoothed = token_loss(hidden, targets, head, LocalGather(), 0.1).loss
    assert torch.equal(LM().loss(state, heads, LocalGather()).loss, smoothed)


def test_logits_and_loss_are_fp32_under_bf16_streams() -> None:
    head = VocabularyHead(4, 7)
    assert head(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    out = token_loss(torch.randn(1, 1, 4, dtype=torch.bfloat16), torch.tensor([[1]]), head, LocalGather())
    assert out.loss.dtype == torch.float32


def test_the_teachers_share_of_the_loss_by_hand() -> None:
    """Two words, of which the second is hidden in one text: student 1 : 3, teacher 1 : 1, a quarter of the target."""
    student, teacher = flat_head(2, [0.0, math.log(3.0)]), flat_head(2, [0.0, 0.0])
    hidden, targets = torch.randn(2, 3, 2), torch.full((2, 3), IGNORED)
    targets[0, 1] = 1
    taught = Teacher(torch.randn(2, 3, 2), teacher, torch.tensor(0.25))
    made = token_loss(hidden, targets, student, LocalGather(), teacher=taught)
    hard = math.log(4.0 / 3.0)
    distilled = 0.5 * math.log(4.0) + 0.5 * math.log(4.0 / 3.0)
    assert made.loss.item() == pytest.approx(0.75 * hard + 0.25 * distilled)
    assert made.metrics["distillation"].item() == pytest.approx(distilled)
    assert made.metrics["accuracy"].item() == 1.0


def test_soft_targets_equal_the_formula_and_teach_the_student_alone() -> None:
    torch.manual_seed(0)
    student, teacher = VocabularyHead(4, 7), VocabularyHead(4, 7)
    hidden, taught = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    targets = torch.tensor([[IGNORED, 3, 6], [0, IGNORED, IGNORED]])
    alpha = 0.4
    made = token_loss(hidden, targets, student, LocalGather(), teacher=Teacher(taught, teacher, torch.tensor(alpha)))
    places = targets != IGNORED
    scores = student(hidden).log_softmax(-1)[places]
    soft = teacher(taught).softmax(-1)[places].detach()
    hard = torch.nn.functional.one_hot(targets[places], 7)
    wanted = -(scores * ((1 - alpha) * hard + alpha * soft)).sum(-1).mean()
    torch.testing.assert_close(made.loss, wanted)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    made.loss.backward()
    torch.testing.assert_close(hidden.grad, gradient)
    assert taught.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_masked_words_act_on_what_has_a_text_and_if_grounded_shows_something() -> None:
    grounded, alone, labels = MLM(), MLM(grounded=False), MLM(include_labels=True)
    assert [kind for kind in DATA_KINDS if grounded.demands(kind, 2)] == ["image_text", "video_text", "images_text"]
    assert [kind for kind in DATA_KINDS if alone.demands(kind, 2)] == [
        "image_text",
        "video_text",
        "text",
        "images_text",
    ]
    assert [kind for kind in DATA_KINDS if labels.demands(kind, 2)] == [
        *("image_text", "video_text", "image_label", "video_label", "images_text"),
    ]


def test_masked_words_are_read_off_every_picture_of_a_set(tokens: SpecialTokens) -> None:
    """The loss is that of the fused row of the masked text and all pictures, whose order matters."""
    objective, model = MLM(probability=0.5), replace(OmniVL.presets["tiny"], **SMALL)
    torch.manual_seed(0)
    chain = build_chain(model, (objective,), tokens).eval()
    chain.embed.block.visual.times.data.normal_()
    frames = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    own = torch.arange(2)
    batch = Batch("images_text", frames, torch.tensor([[1, 6, 7, 8, 2], [1, 9, 10, 2, 0]]), own, own, own)
    batch = replace(batch, prepared=objective.prepare(batch, PrepareContext(0, "test", tokens, (2, 2), 0)))
    layout = plan_layout((objective,), "images_text", 2, 3)

    def loss(shown: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = chain(State.from_batch(replace(batch, frames=shown), layout))["loss"]
        return found

    whole, targets = loss(frames), batch.prepared["mlm/targets"]
    fused = replace(layout, mode="predict", objectives=())
    hidden = chain.fold(State.from_batch(batch, fused))["fused"]
    logits = chain.losses.vocabulary(hidden.flatten(0, 1))
    wanted = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(whole, wanted)
    others = torch.stack(
        [
            loss(torch.cat([frames[:, :one], 255 - frames[:, one : one + 1], frames[:, one + 1 :]], 1))
            for one in range(3)
        ]
    )
    turned = loss(frames.flip(1))
    assert all(not torch.allclose(whole, one) for one in (*others, turned))


def test_soft_targets_ask_for_twins_and_grow(make_batch: Callable[..., Batch], context: PrepareContext) -> None:
    assert MLM().demands("image_text", 3) == MLM(soft_target_warmup_steps=5).demands("image_text", 3)
    taught = MLM(soft_target_alpha=0.4, soft_target_warmup_steps=4)
    demands = taught.demands("image_text", 3)
    assert demands is not None
    assert demands.reads == {"vocabulary", "momentum_vocabulary", "momentum_fused"}
    assert taught.twins == {"visual", "text", "fused"}
    steps = [taught.prepare(make_batch(), replace(context, step=step))["mlm/alpha"].item() for step in (0, 1, 3, 9)]
    assert steps == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert "mlm/alpha" not in MLM().prepare(make_batch(), context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_target_alpha": 1.0}, "soft_target_alpha must be at least 0 and below 1, got 1.0"),
        (
            {"soft_target_alpha": 0.4, "grounded": False},
            "soft_target_alpha must be 0 unless grounded is true: the teacher reads fused rows, got 0.4",
        ),
        ({"soft_target_warmup_steps": -1}, "soft_target_warmup_steps must be at least 0, got -1"),
    ],
)
def test_soft_targets_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        MLM(**options)
    assert str(caught.value) == f"objective mlm: {message}"


def test_a_model_that_is_no_longer_trained_has_no_teacher() -> None:
    kept = MLM(soft_target_alpha=0.4, weight=2.0, on=("pairs",)).after_training()
    assert kept == MLM()
    assert not kept.twins


def test_whole_words_are_hidden_together(tokens: SpecialTokens) -> None:
    """Places 1 and 2 are a word, 3 is one, 4 and 5 are one."""
    text, first = np.array([[1, 6, 7, 8, 9, 10, 2]]), np.array([[0, 1, 1, 3, 4, 4, 6]])
    hidden, passed = (0.0, 0.0, 0.0), (0.9, 0.0, 0.0)
    # The word at 1 is drawn, whatever its second token's own draw says; that at 4 is not, though its second one is.
    drawn = [0.0, *passed, *hidden, *passed, *passed, *passed, *hidden, *passed]
    corrupted, targets = MLM().hide(np.array([drawn]), text, tokens, first=first)
    assert corrupted.tolist() == [[1, tokens.mask, tokens.mask, 8, 9, 10, 2]]
    assert targets.tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, IGNORED, IGNORED]]
    # Nothing is drawn: 0.9 * 5 = 4.5 is the last of its five tokens, whose word is hidden.
    none = [0.9, *(passed * 7)]
    assert MLM().hide(np.array([none]), text, tokens, first=first)[1].tolist() == [[IGNORED] * 4 + [9, 10, IGNORED]]
    # Only 7 may be hidden: of its word that token alone.
    found = MLM().hide(np.array([drawn]), text, tokens, np.array([7]), first)[1]
    assert found.tolist() == [[IGNORED, IGNORED, 7, *[IGNORED] * 4]]


def test_whole_words_of_a_batch(context: PrepareContext) -> None:
    reader = TextReader(load_tokenizer("emoji"), 24)
    texts = ["a dax and a wugdax", "a dax", "daxes"]
    token_ids, special = torch.from_numpy(reader.encode(texts)), reader.tokenizer.special
    first = first_of_word(token_ids.numpy(), reader.tokenizer)
    assert (np.diff(first, axis=1) == 0).any(), "some word has several pieces"
    objective = MLM(probability=0.4, whole_words=True, grounded=False)
    partial = MLM(probability=0.4, grounded=False)
    halves = []
    for one in (objective, partial):
        cut = 0
        for seed in range(40):
            own = torch.arange(3) + 3 * seed
            batch = Batch("text", None, token_ids, own, own, own)
            given = one.prepare(batch, replace(context, tokens=special, readers={"text": reader}))
            hidden = (given["mlm/targets"] != IGNORED).numpy()
            by_first = np.take_along_axis(hidden, first, axis=1)
            cut += int((hidden != by_first).sum())
        halves.append(cut)
    assert halves[0] == 0 and halves[1] > 0
