"""The objectives that TCL adds to ALBEF's against its formulas: contrast within modalities, and of parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Heads
from omnivl.chain.state import State, StepLayout
from omnivl.data.sizes import InputSizes
from omnivl.errors import UserError
from omnivl.objectives import IntraModal, LocalMI
from omnivl.objectives.local_mi import part_contrast, pooled
from omnivl.objectives.univlc import UniVLCHead

B, P, STEPS = 4, 6, 5
LAYOUT = StepLayout("image_text", B, 1)


def test_two_samples_with_two_parts_each_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    parts = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.5, 0.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    scale = torch.tensor(2.0, requires_grad=True)
    losses = part_contrast(query, parts, valid, torch.tensor([3, 8]), scale, LocalGather())
    # Sample 0: own parts have logits 2 and 0; of the other sample only the first part exists, logit 0.
    # Its terms are log(1 + e^(0 - 2)) and log(1 + e^0), their mean is one half of the sum.
    # Sample 1: its only part has logit 2; the other sample's parts have logits 0 and 0: log(1 + 2 e^-2).
    wanted = [(math.log(1 + math.exp(-2)) + math.log(2)) / 2, math.log(1 + 2 * math.exp(-2))]
    torch.testing.assert_close(losses, torch.tensor(wanted))
    losses.sum().backward()
    # With s = e^-2 / (1 + e^-2) and 1/2 as the shares of what is no positive, sample 0 has
    # d/dq = scale/2 (s (n - p1) + 1/2 (n - p2)), n = (0, 1), p1 = (1, 0), p2 = (0, 0).
    share, other = math.exp(-2) / (1 + math.exp(-2)), 2 * math.exp(-2) / (1 + 2 * math.exp(-2))
    own = [2 / 2 * (-share), 2 / 2 * (share + 0.5)]
    # Sample 1: d/dq = scale * t (mean of the negatives - p), negatives (1, 0) and (0, 0) with equal shares.
    torch.testing.assert_close(query.grad, torch.tensor([own, [2 * other * 0.5, -2 * other]]))
    # d/dscale: the same with products: sample 0 has s (0 - 1) / 2 + 0, sample 1 t (0 - 1).
    torch.testing.assert_close(scale.grad, torch.tensor(-share / 2 - other))


def test_parts_of_equal_samples_are_no_negatives_and_padding_weighs_nothing() -> None:
    torch.manual_seed(0)
    query, parts = F.normalize(torch.randn(3, P), dim=-1), F.normalize(torch.randn(3, 5, P), dim=-1)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    scale, identity = torch.tensor(3.0), torch.tensor([7, 7, 9])
    losses = part_contrast(query, parts, valid, identity, scale, LocalGather())
    alone = part_contrast(query[:1], parts[:1], valid[:1], identity[:1], scale, LocalGather())
    assert alone.item() == 0.0, "nothing to tell it from"
    wanted = part_contrast(query[[0, 2]], parts[[0, 2]], valid[[0, 2]], identity[[0, 2]], scale, LocalGather())
    torch.testing.assert_close(losses[0], wanted[0])
    other = torch.where(valid[..., None], parts, torch.randn_like(parts))
    torch.testing.assert_close(part_contrast(query, other, valid, identity, scale, LocalGather()), losses)


def of_released_code(query: Tensor, parts: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """TCL's loss of one modality, part by part: a softmax over the part and all parts of the other samples."""
    of_samples = []
    for sample, own in enumerate(parts):
        rest = [part for other in range(len(parts)) if other != sample for part in parts[other][valid[other]]]
        terms = []
        for part in own[valid[sample]]:
            logits = scale * torch.stack([part, *rest]) @ query[sample]
            terms.append(-logits.log_softmax(0)[0])
        of_samples.append(torch.stack(terms).mean())
    return torch.stack(of_samples).mean()


def test_the_local_loss_is_that_of_the_released_code() -> None:
    """Loss and gradients of queries and temperature; images of 4 x 4 patches, pooled to 2 x 2."""
    torch.manual_seed(0)
    raw = {"visual": torch.randn(B, P), "text": torch.randn(B, P)}
    patches, words = F.normalize(torch.randn(B, 16, P), dim=-1), F.normalize(torch.randn(B, 6, P), dim=-1)
    mask = torch.arange(7) < torch.tensor([7, 2, 4, 5])[:, None]
    regions = F.avg_pool2d(patches.view(B, 4, 4, P).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(pooled(patches, 2), regions)
    found = []
    for ours in (True, False):
        leaves = {name: value.clone().requires_grad_() for name, value in raw.items()}
        scale = torch.tensor(10.0, requires_grad=True)
        visual, text = (F.normalize(leaf, dim=-1) for leaf in leaves.values())
        if ours:
            given = {"visual_embedding": visual, "text_embedding": text, "logit_scale": scale}
            given |= {"momentum_visual_parts": patches, "momentum_text_parts": words, "text_mask/clean": mask}
            made = LocalMI(pool=2).loss(State({**given, "identity": torch.arange(B)}, LAYOUT), Heads(), LocalGather())
            assert made.metrics.keys() == {"visual", "text"}
            loss = made.loss
        else:
            everywhere = torch.ones(B, 4, dtype=torch.bool)
            loss = (
                of_released_code(visual, regions, everywhere, scale) + of_released_code(text, words, mask[:, 1:], scale)
            ) / 2
        loss.backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves.values()), scale.grad))
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted)


def within_modalities(embedded: dict[str, Tensor], queue: dict[str, Tensor], temperature: Tensor) -> Tensor:
    """TCL's contrast within modalities: keys are momentum embeddings of batch and queue, targets one-hot."""
    losses = []
    for modality in ("visual", "text"):
        keys = torch.cat([embedded[f"momentum_{modality}_embedding"], queue[modality]])
        scores = embedded[f"{modality}_embedding"] @ keys.t() / temperature
        losses.append(F.cross_entropy(scores, torch.arange(B)))
    return (losses[0] + losses[1]) / 2


def test_the_contrast_within_modalities_is_tcls_where_each_sample_is_its_own_concept() -> None:
    """Loss and gradients, over steps in which the queue fills and turns."""
    random = torch.Generator().manual_seed(0)
    objective, head = IntraModal(queue_size=3 * B), UniVLCHead(3 * B, P)
    queue = {"visual": torch.empty(0, P), "text": torch.empty(0, P)}
    names = ("visual_embedding", "text_embedding", "momentum_visual_embedding", "momentum_text_embedding")
    for step in range(STEPS):
        raw, found = {name: torch.randn(B, P, generator=random) for name in names}, []
        for ours in (True, False):
            leaves = {name: value.clone().requires_grad_() for name, value in raw.items()}
            embedded = {name: F.normalize(leaf, dim=-1) for name, leaf in leaves.items()}
            embedded |= {name: one.detach() for name, one in embedded.items() if "momentum" in name}
            temperature = torch.tensor(0.07 + 0.01 * step, requires_grad=True)
            if ours:
                given = {**embedded, "identity": torch.arange(B) + step * B, "logit_scale": 1.0 / temperature}
                made = objective.loss(State(given, LAYOUT), Heads(head), LocalGather())
                assert made.metrics.keys() == {"visual", "visual_r1", "text", "text_r1"}
                loss = made.loss
            else:
                loss = within_modalities(embedded, queue, temperature)
            loss.backward()
            found.append((loss.detach(), *(leaves[name].grad for name in names[:2]), temperature.grad))
        for own, wanted in zip(*found, strict=True):
            torch.testing.assert_close(own, wanted)
        head.after_step(LocalGather())
        for side in queue:
            newest = F.normalize(raw[f"momentum_{side}_embedding"], dim=-1)
            queue[side] = torch.cat([newest, queue[side]])[: 3 * B]


def test_keys_of_one_identity_are_all_positives() -> None:
    embedded = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), dim=-1)
    names = ("visual_embedding", "text_embedding", "momentum_visual_embedding", "momentum_text_embedding")
    given = dict.fromkeys(names, embedded) | {"identity": torch.tensor([4, 4, 5]), "logit_scale": torch.tensor(1.0)}
    made = IntraModal().loss(State(given, StepLayout("image_text", 3, 1)), Heads(), LocalGather())
    scores = (embedded @ embedded.t()).log_softmax(-1)
    wanted = -torch.stack([scores[0, :2].mean(), scores[1, :2].mean(), scores[2, 2]]).mean()
    torch.testing.assert_close(made.loss, wanted)


def test_what_they_read() -> None:
    twins = {"momentum_visual_embedding", "momentum_text_embedding"}
    own = {"visual_embedding", "text_embedding", "logit_scale"}
    assert IntraModal().demands("video_label", 3).reads == own | twins
    assert LocalMI().demands("image_text", 3).reads == own | {"momentum_visual_parts", "momentum_text_parts"}
    assert LocalMI().twins == IntraModal().twins == {"visual", "text"}
    assert IntraModal().demands("text", 3) is None
    assert LocalMI().demands("video_text", 3) is None
    assert IntraModal().after_training() is None
    assert LocalMI().after_training() is None
    assert LocalMI(negatives="global").needs_whole_texts
    assert not LocalMI().needs_whole_texts


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({"pool": 3}, {}, "pool: got 3; allowed a divisor of 4, the patches per side of an image; change it"),
        (
            {"pool": 2},
            {"native": True},
            "kind: got 'local_mi' with model.sizes 'native'; allowed images of one size; change model.sizes",
        ),
        ({"pool": 4}, {}, None),
    ],
)
def test_squares_of_patches_cut_images_evenly(options, sizes, message) -> None:
    inputs = InputSizes(
        image_size=16, video_size=16, num_frames=1, patch_size=4, tubelet_size=1, text_length=6, **sizes
    )
    assert [str(one) for one in LocalMI(**options).misfits(inputs, 8)] == ([] if message is None else [message])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalMI(pool=0), "objective local_mi: pool must be at least 1, got 0"),
        (lambda: IntraModal(queue_size=-1), "objective intra_modal: queue_size must be at least 0, got -1"),
    ],
)
def test_options_out_of_their_range_are_refused(make, message) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message
