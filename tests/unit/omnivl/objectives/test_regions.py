"""Objectives on regions of pictures: their draws, and their losses by the formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_towers import scattered
from small_xvlm import CONFIG, OBJECTIVES, REGIONS, TOKENS, collated, examples

from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.state import State
from omnivl.errors import ModelError, UserError
from omnivl.objectives import ITC, MLM, VLM, Locate
from omnivl.objectives.locate import centred, corners, overlaps

SIZE = 8
ROWS = SIZE * (1 + REGIONS)


def chain_of(objectives=OBJECTIVES):
    torch.manual_seed(0)
    return scattered(build_chain(CONFIG, objectives, TOKENS))


def state_of(objectives=OBJECTIVES, samples=None):
    batch = collated(examples(SIZE) if samples is None else samples, objectives)
    return State.from_batch(batch, plan_layout(objectives, "image_text", batch.size, 1))


def test_rows_are_the_picture_and_regions_that_the_view_shows():
    samples = examples(SIZE)
    drawn = collated(samples).prepared
    ids, boxes = drawn["regions/token_ids"].view(SIZE, -1, 6), drawn["regions/boxes"].view(SIZE, -1, 4)
    present, located = drawn["regions/present"].view(SIZE, -1), drawn["regions/located"].view(SIZE, -1)
    for row, sample in enumerate(samples):
        placed = sample.fields["region_boxes"]
        shown = int(placed.present.sum())
        assert present[row].tolist() == [place <= min(shown, REGIONS) for place in range(1 + REGIONS)]
        assert located[row].tolist() == [False, *present[row, 1:].tolist()]
        assert boxes[row, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
        known = {tuple(round(one, 5) for one in box) for box in placed.values[placed.present].tolist()}
        found = [tuple(round(one, 5) for one in box) for box in boxes[row, located[row]].tolist()]
        assert set(found) <= known
        assert len(set(found)) == len(found)
        # Absent rows are the whole picture and an empty text, which attention can look at.
        assert (boxes[row, ~present[row]] == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()
        assert (ids[row, ~present[row]] == torch.tensor([1, 2, 0, 0, 0, 0])).all()
    assert 0 < present.float().mean() < 1


def test_a_sample_draws_the_same_in_any_batch():
    samples = examples(SIZE)
    whole, half = collated(samples).prepared, collated(samples[4:]).prepared
    for name in ("token_ids", "boxes", "present", "located", "identity"):
        assert torch.equal(whole[f"regions/{name}"].view(SIZE, 1 + REGIONS, -1)[4:].flatten(0, 1).squeeze(-1),
                           half[f"regions/{name}"])  # fmt: skip
    for name in ("mlm/token_ids", "mlm/targets", "vlm/uniforms"):
        assert torch.equal(whole[name][ROWS // 2 :], half[name])


def test_equal_texts_have_equal_identities():
    drawn = collated(examples(SIZE)).prepared
    ids, identity = drawn["regions/token_ids"], drawn["regions/identity"]
    assert torch.equal((ids[:, None] == ids).all(-1), identity[:, None] == identity)


def test_contrast_is_the_cross_entropy_of_what_is_there():
    state = state_of()
    random = torch.Generator().manual_seed(0)
    visual, text = (F.normalize(torch.randn(ROWS, 8, generator=random), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(7.0, requires_grad=True)
    fields = {"regions/visual_embedding": visual, "regions/embedding": text, "logit_scale": scale}
    made = ITC(regions=REGIONS).loss(state.merged(fields), Heads(), LocalGather())
    present = state["regions/present"]
    assert 0 < present.sum() < ROWS
    logits = scale * visual[present] @ text[present].t()
    labels = torch.arange(len(logits))
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    torch.testing.assert_close(made.loss, wanted)
    right = (logits.argmax(1) == labels).float().mean()
    torch.testing.assert_close(made.metrics["visual_to_text_r1"], right)
    inputs = [visual, text, scale]
    got, expected = (torch.autograd.grad(loss, inputs) for loss in (made.loss, wanted))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not got[0][~present].any()
    assert not got[1][~present].any()


def test_negatives_are_other_texts_that_are_there_of_the_same_picture_too():
    objective = VLM(regions=REGIONS, epsilon=0.0)
    state = state_of((ITC(regions=REGIONS), objective))
    picture = torch.arange(ROWS) // (1 + REGIONS)
    alike = torch.eye(SIZE)[picture]  # all of a picture are nearest to one another
    fields = {"regions/visual_embedding": alike, "regions/embedding": alike, "logit_scale": torch.tensor(100.0)}
    drawn = objective.draw(state.merged(fields), LocalGather())
    present, identity = state["regions/present"], state["regions/identity"]
    has_sibling = ((picture[:, None] == picture) & (identity[:, None] != identity) & present).any(-1)
    assert 0 < has_sibling.sum() < ROWS
    for rows in drawn.rows.values():
        assert present[rows].all()
        assert (identity[rows] != identity).all()
        assert torch.equal(picture[rows] == picture, has_sibling)
    (count,) = objective.terms(state, LocalGather()).values()
    assert count == 3 * present.sum()


def test_matching_counts_what_is_there():
    objectives = (ITC(regions=REGIONS), VLM(regions=REGIONS))
    chain, state = chain_of(objectives), state_of(objectives)
    seen = []
    loss_of = VLM.loss

    class Watched(VLM):
        def loss(self, state, heads, gather):
            seen.append((state, heads))
            return loss_of(self, state, heads, gather)

    chain.layers[-1].objectives["vlm"] = Watched(regions=REGIONS)
    made = chain(state)["loss/vlm"]
    ((end, heads),) = seen
    present = end["regions/present"]
    logits = heads.own(end.pooled(*VLM(regions=REGIONS).segments)).view(3, ROWS, 2)[:, present]
    targets = torch.tensor([1, 0, 0])[:, None].expand(3, int(present.sum()))
    torch.testing.assert_close(made, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_boxes_are_those_of_regions_and_not_of_whole_pictures():
    state = state_of()
    random = torch.Generator().manual_seed(0)
    objective = Locate(regions=REGIONS, l1_weight=2.0)
    head = objective.build_head(CONFIG.heads)
    pooled = torch.randn(state.layout.fused["locate"].stop, 16, generator=random)
    made = objective.loss(state.merged({"pooled": pooled}), Heads(head), LocalGather())
    located, boxes = state["regions/located"], state["regions/boxes"]
    found = head(pooled[state.layout.fused["locate"]])[located]
    far = (found - centred(boxes[located])).abs().sum(1)
    wanted = 2.0 * far + 1.0 - overlaps(corners(found), boxes[located])[1]
    torch.testing.assert_close(made.loss, wanted.mean())


def test_a_text_about_a_box_sees_the_box_and_the_located_one_sees_the_picture():
    """Behind the encoder, a patch outside of a box changes where its text is located, and nothing else of its row."""
    chain, state = chain_of().eval(), state_of()
    split = next(place for place, layer in enumerate(chain.program) if type(layer).__name__ == "VisualRegions")
    for layer in chain.program[:split]:
        state = layer(state)

    def end(visual):
        own = state.updated(visual=visual)
        for layer in chain.program[split:-1]:
            own = layer(own)
        return own

    touched = state["visual"].clone()
    touched[:, 6] += 1.0
    before, after = end(state["visual"]), end(touched)
    inside = before["memory_mask"][-ROWS:, 6]
    positive = before.layout.fused["vlm/positive"], before.layout.fused["mlm"]
    located = before.layout.fused["locate"]
    for rows in positive:
        changed = (before["fused"][rows] - after["fused"][rows]).abs().amax((1, 2)) > 1e-6
        assert torch.equal(changed, inside)
    assert ((before["fused"][located] - after["fused"][located]).abs().amax((1, 2)) > 1e-6).all()
    assert 0 < inside.sum() < ROWS


def test_the_picture_is_encoded_once():
    layout = state_of().layout
    assert layout.visual == {"clean": slice(0, SIZE)}
    assert layout.text == {"regions": slice(0, ROWS), "mlm": slice(ROWS, 2 * ROWS)}
    assert {name: rows.stop - rows.start for name, rows in layout.fused.items()} == dict.fromkeys(
        ("vlm/positive", "vlm/negative_visual", "vlm/negative_text", "mlm", "locate"), ROWS
    )


def test_everything_learns():
    chain = chain_of()
    state = state_of()
    chain(state)["loss"].backward()
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([state.layout])}
    missed = [name for name, one in chain.named_parameters() if (one.grad is None) != (id(one) in idle)]
    assert not missed
    unmoved = [name for name, one in chain.named_parameters() if one.grad is not None and not one.grad.any()]
    assert not unmoved


def test_a_head_is_shared():
    objectives = (
        *(ITC(on=("whole",)), VLM(on=("whole",), head="perceptron")),
        *(ITC(name="region_itc", regions=2), VLM(name="region_vlm", regions=2, shares_head="vlm", on=("letters",))),
    )
    chain = build_chain(CONFIG, objectives, TOKENS)
    losses = chain.layers[-1]
    assert list(losses.heads) == ["vlm"]
    assert losses.heads_of("region_vlm").own is losses.heads["vlm"]
    layout = plan_layout(objectives, "image_text", SIZE, 1, "letters")
    assert not set(losses.heads["vlm"].parameters()) & set(losses.idle_parameters([layout]))


def test_one_number_of_regions_is_read_in_a_step():
    with pytest.raises(ModelError) as caught:
        plan_layout((ITC(regions=2), VLM(regions=3)), "image_text", SIZE, 1)
    assert str(caught.value) == (
        "objectives 'itc' and 'vlm' read 2 and 3 regions of a picture in one step; allowed is one number; make their "
        "regions equal, or put them on data entries of their own"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Locate(regions=-1), "objective locate: regions must be at least 0, got -1"),
        (lambda: ITC(regions=1, loss_type="sigmoid"), "objective itc: loss_type must be 'softmax' with regions, got"),
        (lambda: ITC(regions=1, label_smoothing=0.1), "objective itc: label_smoothing must be 0 with regions, got 0.1"),
        (lambda: VLM(regions=1, similarities="momentum"), "similarities must be 'online' with regions, got 'momentum'"),
        (lambda: MLM(regions=1, soft_target_alpha=0.4), "soft_target_alpha must be 0 with regions, got 0.4"),
        (lambda: MLM(regions=1, grounded=False), "objective mlm: grounded must be true with regions, got False"),
    ],
)
def test_an_option_that_regions_do_not_have_is_refused(build, message):
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)


def test_regions_are_of_images_with_texts():
    for objective in OBJECTIVES:
        assert list(objective.demands_of_kinds) == ["image_text"]
        assert objective.sample_fields.keys() == {"regions", "region_boxes"}
        assert replace(objective, regions=0).sample_fields.keys() == ({"box"} if objective.key == "locate" else set())
