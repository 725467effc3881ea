import pickle
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from omnivl.chain.objective import replica_mean
from omnivl.errors import UserError
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, VLM, NegativeWeights, ObjectiveConfig, UniVLC

MEMBERS = get_args(get_args(ObjectiveConfig)[0])


class TwoReplicas:
    """The counts of another replica, known beforehand."""

    replicas = 2
    replica = 0

    def __init__(self, other: float) -> None:
        self.other = other

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not joined here")

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        assert not tensor.requires_grad
        return tensor + self.other


def test_weight_rises_linearly_to_its_value() -> None:
    objective = MLM(weight=2.0, weight_warmup_steps=4)
    assert [objective.weight_at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert MLM(weight=3.0).weight_at(0) == 3.0


def test_replica_means_average_to_the_joined_mean() -> None:
    # Replica 0: sum 6 over 3 terms; replica 1: sum 2 over 1 term. Joined mean 8 / 4 = 2.
    # Each gives sum * 2 / 4: 3 and 1, whose average is 2.
    total = torch.tensor(6.0, requires_grad=True)
    first = replica_mean(total, torch.tensor(3), TwoReplicas(other=1.0))
    second = replica_mean(torch.tensor(2.0), torch.tensor(1), TwoReplicas(other=3.0))
    assert first.item() == 3.0
    assert second.item() == 1.0
    first.backward()
    assert total.grad is not None
    assert total.grad.item() == 0.5  # d(joined mean)/d(sum) = 1/4, times 2 because replicas are averaged


def test_replica_mean_of_nothing_is_zero_with_a_graph() -> None:
    total = torch.zeros((), requires_grad=True)
    loss = replica_mean(total, torch.tensor(0), TwoReplicas(other=0.0))
    loss.backward()
    assert loss.item() == 0.0
    assert total.grad is not None
    assert torch.isfinite(total.grad)


@pytest.mark.parametrize("member", MEMBERS)
def test_members_are_named_by_kind_and_picklable(member: type) -> None:
    objective = member()
    assert objective.key == objective.kind
    assert objective.kind.replace("_", "") == member.__name__.lower()
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_union_reads_every_kind_and_lists_them_for_an_unknown_one() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(ObjectiveConfig)
    assert [adapter.validate_python({"kind": member().kind}) for member in MEMBERS] == [member() for member in MEMBERS]
    with pytest.raises(ValidationError, match=", ".join(repr(member().kind) for member in MEMBERS)):
        adapter.validate_python({"kind": "mml"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLM(weight=-1.0), "objective mlm: weight must be at least 0, got -1.0"),
        (lambda: MLM(weight_warmup_steps=-1), "objective mlm: weight_warmup_steps must be at least 0, got -1"),
        (lambda: MLM(probability=0.0), "objective mlm: probability must be above 0 and at most 1, got 0.0"),
        (lambda: MLM(mask_share=1.5), "objective mlm: mask_share must be from 0 to 1, got 1.5"),
        (
            lambda: MLM(mask_share=0.75, random_share=0.5),
            "objective mlm: random_share must be from 0 to 1 - mask_share = 0.25, got 0.5",
        ),
        (lambda: MRM(probability=1.0), "objective mrm: probability must be above 0 and below 1, got 1.0"),
        (lambda: MRM(min_block=0), "objective mrm: min_block must be at least 1, got 0"),
        (lambda: MFM(every=0), "objective mfm: every must be at least 1, got 0"),
        (lambda: MFM(every=2, offset=2), "objective mfm: offset must be from 0 to every - 1 = 1, got 2"),
        (lambda: MCM(clip_length=0), "objective mcm: clip_length must be at least 1, got 0"),
        (lambda: LM(label_smoothing=1.0), "objective lm: label_smoothing must be at least 0 and below 1, got 1.0"),
        (lambda: VLM(epsilon=-1e-4), "objective vlm: epsilon must be at least 0, got -0.0001"),
        (
            lambda: UniVLC(temperature=0.7),
            "objective univlc: temperature must be within temperature_bounds, 0.001 to 0.5, got 0.7",
        ),
        (
            lambda: UniVLC(temperature_bounds=(0.5, 0.1)),
            "objective univlc: temperature_bounds must be two rising numbers above 0, got (0.5, 0.1)",
        ),
        (lambda: UniVLC(queue_size=-1), "objective univlc: queue_size must be at least 0, got -1"),
        (
            lambda: UniVLC(soft_target_alpha=1.0),
            "objective univlc: soft_target_alpha must be at least 0 and below 1, got 1.0",
        ),
        (
            lambda: UniVLC(soft_target_alpha=0.4),
            "objective univlc: soft_target_alpha must be 0 unless batch_keys is momentum: the teacher compares its "
            "own, got 0.4",
        ),
        (
            lambda: UniVLC(soft_target_warmup_steps=-1),
            "objective univlc: soft_target_warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: UniVLC(negative_weights=NegativeWeights(image=-1.0)),
            "objective univlc: negative_weights must be at least 0 each, "
            "got NegativeWeights(image=-1.0, video=1.0, caption=1.0, label=1.0)",
        ),
    ],
)
def test_options_out_of_range_are_refused(make, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message


def test_demands_by_kind() -> None:
    kinds = ("image_text", "video_text", "image_label", "video_label")
    active = {member.__name__: [kind for kind in kinds if member().demands(kind, 2) is not None] for member in MEMBERS}
    captions = ["image_text", "video_text"]
    images, videos = ["image_text", "image_label"], ["video_text", "video_label"]
    wanted = {
        **{"MLM": captions, "VLM": captions, "LM": captions},
        **{"MRM": images, "MFM": videos, "MCM": videos},
        "MDM": ["image_text", "image_label"],
        "UniVLC": list(kinds),
    }
    assert {name: active[name] for name in wanted} == wanted
    for member in (MLM, VLM, LM):
        assert member(include_labels=True).demands("image_label", 2) is not None
