import pytest
import torch

from omnivl.objectives.key_queue import KeyQueue
from omnivl.objectives.univlc import Keys


def keys(*identities: int) -> Keys:
    """Keys whose every field tells which sample they are of."""
    values = torch.tensor(identities)
    features = values.float()[:, None].repeat(1, 2)
    return Keys(features, -features, values, values % 4, torch.ones_like(values, dtype=torch.bool))


def test_entries_go_in_order_and_wrap_around() -> None:
    queue = KeyQueue(4, 2)
    assert not queue.keys().valid.any()
    queue.push(keys(1, 2, 3))
    assert queue.keys().identity.tolist() == [1, 2, 3, 0]
    assert queue.keys().valid.tolist() == [True, True, True, False]
    queue.push(keys(4, 5))  # 4 takes the last place, 5 that of 1
    assert queue.keys().identity.tolist() == [5, 2, 3, 4]
    assert queue.keys().valid.all()
    assert queue.keys().domain.tolist() == [1, 2, 3, 0]
    assert queue.keys().visual[:, 0].tolist() == [5, 2, 3, 4]
    assert queue.keys().text[:, 1].tolist() == [-5, -2, -3, -4]
    assert queue.pointer.item() == 1


def test_a_batch_larger_than_the_queue_leaves_its_newest() -> None:
    queue = KeyQueue(3, 2)
    queue.push(keys(1))
    queue.push(keys(2, 3, 4, 5, 6, 7, 8))
    # One by one: place of key k is (k - 1) mod 3, so 6 -> 2, 7 -> 0, 8 -> 1.
    assert queue.keys().identity.tolist() == [7, 8, 6]


@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_any_split_of_the_stream_gives_the_same_queue(size: int) -> None:
    whole, split = KeyQueue(size, 2), KeyQueue(size, 2)
    stream = list(range(1, 20))
    for identity in stream:
        whole.push(keys(identity))
    for part in (stream[:2], stream[2:9], stream[9:10], stream[10:]):
        split.push(keys(*part))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, split.state_dict()[name]), name


def test_everything_is_in_the_checkpoint() -> None:
    queue, other = KeyQueue(4, 2), KeyQueue(4, 2)
    queue.push(keys(1, 2, 3))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(keys(4, 5))
    assert other.keys().identity.tolist() == queue.keys().identity.tolist() == [5, 2, 3, 4]
    assert other.keys().domain.tolist() == queue.keys().domain.tolist()
    assert not list(queue.parameters())


def test_features_are_fp32_whatever_comes_in() -> None:
    queue = KeyQueue(2, 2)
    one = keys(1)
    queue.push(Keys(one.visual.bfloat16(), one.text.bfloat16(), one.identity, one.domain, one.valid))
    assert queue.keys().visual.dtype == queue.keys().text.dtype == torch.float32
