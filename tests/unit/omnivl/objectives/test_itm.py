"""Image-text matching by other samples' images, and the alignment of words and patches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS, Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import UserError
from omnivl.objectives import ITM, PrepareContext
from omnivl.objectives.optimal_transport import transport_distance

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=50, num_reserved=5)
CONTEXT = PrepareContext(0, "test", TOKENS, (2, 2), 0)


class SecondOfTwo:
    """The second of two replicas with two samples each."""

    replicas, replica = 2, 1

    def join(self, tensor):
        return torch.cat([torch.tensor([5, 6]), tensor])

    def total(self, tensor):
        return 2 * tensor


def drawn(objective, identity, uniforms, gather=None):
    layout = plan_layout((objective,), "image_text", len(identity), 1)
    state = State({"identity": torch.tensor(identity), "itm/uniforms": torch.tensor(uniforms)}, layout)
    made = objective.draw(state, gather or LocalGather())
    return made.rows["itm"].tolist(), made.leaves["itm/matches"].tolist(), made.across


def test_images_are_drawn_evenly_among_the_others():
    uniforms = [[0.4, 0.0], [0.6, 0.0], [0.49, 0.51], [0.1, 0.99]]
    # Of samples 0, 2 and 3 each takes one of the three others: the first, the second and the last of them.
    assert drawn(ITM(), [7, 8, 9, 10], uniforms) == ([1, 1, 1, 2], [False, True, False, False], False)
    # With the own image among four candidates: numbers 0, 2 and 3.
    with_own = ITM(exclude_equal=False)
    assert drawn(with_own, [7, 8, 9, 10], uniforms) == ([0, 1, 2, 3], [False, True, False, False], False)
    assert drawn(ITM(replaced=0.2), [7, 8, 9, 10], uniforms)[1] == [True, True, True, False]


def test_images_of_equal_identity_are_left_out_and_who_has_no_other_keeps_its_own():
    uniforms = [[0.0, 0.99], [0.0, 0.99], [0.0, 0.0]]
    assert drawn(ITM(), [7, 7, 8], uniforms) == ([2, 2, 0], [False, False, False], False)
    assert drawn(ITM(), [7, 7, 7], uniforms) == ([0, 1, 2], [True, True, True], False)


def test_images_of_all_replicas_are_counted_from_the_own_ones_on():
    objective = ITM(negatives="global")
    # Joined: 5, 6 of the first replica, 7, 8 here. Sample 7 takes the first of 5, 6, 8, sample 8 the last of 5, 6, 7.
    rows, matches, across = drawn(objective, [7, 8], [[0.0, 0.0], [0.0, 0.99]], SecondOfTwo())
    # Own first: 7, 8, 5, 6.
    assert (rows, matches, across) == ([2, 0], [False, False], True)


def test_draws_follow_from_a_samples_position_alone():
    def batch(positions):
        own = torch.tensor(positions)
        return Batch("image_text", torch.zeros(len(positions), 1, 3, 4, 4), None, own, own, own)

    whole = ITM().prepare(batch([3, 4, 5, 6]), CONTEXT)["itm/uniforms"]
    assert torch.equal(ITM().prepare(batch([5, 6]), CONTEXT)["itm/uniforms"], whole[2:])
    many = ITM().prepare(batch(list(range(2000))), CONTEXT)["itm/uniforms"]
    assert (many[:, 0] < 0.5).float().mean() == pytest.approx(0.5, abs=0.04)


def loss_state(objective):
    layout = plan_layout((objective,), "image_text", 3, 1)
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return State(
        {
            "fused": torch.randn(3, 5, 4, generator=draw),
            "fused_visual/itm": torch.randn(3, 7, 4, generator=draw),
            "fused_mask": mask,
            "pooled": torch.randn(3, 6, generator=draw),
            "itm/matches": torch.tensor([True, False, True]),
        },
        layout,
    )


def test_the_loss_reads_rows_as_a_whole_and_aligns_words_with_patches():
    objective = ITM(alignment_weight=0.3)
    torch.manual_seed(0)
    head = objective.build_head(HeadSizes({"fused": 4, "pooled": 6}, 5, 50, 0, 8, 1, 16))
    state = loss_state(objective)
    made = objective.loss(state, Heads(head), LocalGather())
    matching = F.cross_entropy(head.output(state["pooled"]), torch.tensor([1, 0, 1]))
    # Words are what lies between [CLS] and [SEP]: two, none and three of them. Patches come behind the class token.
    words, patches = state["fused"], state["fused_visual/itm"]

    def distance(row, number):
        own = words[row : row + 1, 1 : 1 + number], patches[row : row + 1, 1:]
        return transport_distance(*own, *(torch.ones(1, side.shape[1], dtype=torch.bool) for side in own))[0]

    aligned = (distance(0, 2) - 0.0 + distance(2, 3)) / 3
    torch.testing.assert_close(made.loss, matching + 0.3 * aligned)
    torch.testing.assert_close(made.metrics["distance"], aligned)  # the pair without words is at no distance
    assert made.metrics["matches"] == pytest.approx(2 / 3)
    plain = replace(objective, alignment_weight=0.0)
    without = State({name: state[name] for name in ("pooled", "itm/matches")}, loss_state(plain).layout)
    torch.testing.assert_close(plain.loss(without, Heads(head), LocalGather()).loss, matching)


def test_own_pairs_are_drawn_together_and_others_apart():
    objective = ITM()
    head = objective.build_head(HeadSizes({"fused": 4, "pooled": 6}, 5, 50, 0, 8, 1, 16))
    state = loss_state(objective)
    state["fused"].requires_grad_()
    state["itm/matches"] = torch.tensor([True, False, False])
    objective.loss(state, Heads(head), LocalGather()).loss.backward()
    moved = state["fused"].detach() - 0.1 * state["fused"].grad
    patches = state["fused_visual/itm"][:, 1:]
    is_word = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    everywhere = torch.ones(3, 6, dtype=torch.bool)
    before, after = (transport_distance(x[:, 1:4], patches, is_word, everywhere) for x in (state["fused"], moved))
    assert after[0] < before[0]
    assert after[2] > before[2]
    assert torch.equal(moved[1], state["fused"][1])


def test_it_acts_on_pairs():
    acting = [kind for kind in DATA_KINDS if ITM().demands(kind, 2) is not None]
    assert acting == ["image_text", "video_text"]
    acting = [kind for kind in DATA_KINDS if ITM(include_labels=True).demands(kind, 2) is not None]
    assert acting == ["image_text", "video_text", "image_label", "video_label"]
    assert ITM().demands("image_text", 2).streams == {"fused", "fused_visual"}
    assert ITM(alignment_weight=0.0).demands("image_text", 2).streams == {"fused"}


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("replaced", 0.0, "above 0 and below 1"),
        ("replaced", 1.0, "above 0 and below 1"),
        ("alignment_weight", -1.0, "at least 0"),
    ],
)
def test_options_out_of_range_are_refused(option, value, allowed):
    with pytest.raises(UserError) as caught:
        ITM(**{option: value})
    assert str(caught.value) == f"objective itm: {option} must be {allowed}, got {value!r}"
