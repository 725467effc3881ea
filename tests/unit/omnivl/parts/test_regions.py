"""The end of X-VLM's image encoder: patches of boxes and means, worked out by hand."""

import pytest
import torch

from omnivl.parts.regions import FrameMean, patches_of_boxes, region_features


@pytest.mark.parametrize(
    ("box", "touched"),
    [
        ((0.0, 0.0, 1.0, 1.0), range(16)),
        ((0.25, 0.5, 0.75, 0.75), (9, 10)),  # on the borders of patches: none beyond
        ((0.3, 0.3, 0.55, 0.45), (5, 6)),  # a part of a patch is enough
        ((0.99, 0.99, 1.0, 1.0), (15,)),
        ((0.5, 0.0, 0.5, 0.1), (2,)),  # without width: still one
        ((1 / 3, 0.0, 1.0, 0.2), (1, 2, 3)),
    ],
)
def test_a_box_has_the_patches_that_it_touches(box: tuple[float, ...], touched: object) -> None:
    found = patches_of_boxes(torch.tensor([box]), 4)
    assert found.nonzero()[:, 1].tolist() == list(touched)  # type: ignore[call-overload]


def test_rounding_adds_no_patch() -> None:
    edges = torch.tensor([1 / 7, 1 / 7, 3 / 7, 3 / 7])
    boxes = torch.stack([edges + step * torch.finfo(torch.float32).eps for step in (-1, 0, 1)])
    assert patches_of_boxes(boxes, 7).sum(1).tolist() == [4, 4, 4]


def test_a_region_is_its_mean_and_its_patches() -> None:
    # Two images of 2 x 2 patches of width 1, each with two boxes: the whole, and one column or row.
    images = torch.tensor([[9.0, 1.0, 2.0, 3.0, 6.0], [9.0, 10.0, 20.0, 30.0, 60.0]])[..., None].requires_grad_()
    whole, left, top = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.4)
    features, mask = region_features(images, torch.tensor([whole, left, whole, top]))
    assert features[..., 0].tolist() == [
        [3.0, 1.0, 2.0, 3.0, 6.0],
        [2.0, 1.0, 2.0, 3.0, 6.0],
        [30.0, 10.0, 20.0, 30.0, 60.0],
        [15.0, 10.0, 20.0, 30.0, 60.0],
    ]
    assert mask.long().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # The gradient of a mean is divided among its patches; the old first position gets none.
    features[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad[..., 0].tolist() == [[0.0, 0.75, 0.25, 0.75, 0.25], [0.0, 0.75, 0.75, 0.25, 0.25]]


def test_frames_are_averaged_and_marked() -> None:
    end = FrameMean(width=1, frames=2)
    assert end.times is not None
    with torch.no_grad():
        end.times.copy_(torch.tensor([[1.0], [3.0]]))
    # Two frames with a class token and two patches each.
    clip = torch.tensor([[7.0, 1.0, 2.0, 7.0, 5.0, 8.0]])[..., None].requires_grad_()
    made = end(clip, 2)
    assert made[..., 0].tolist() == [[6.0, 5.0, 7.0]]  # (1 + 5) / 2 + 2, (2 + 8) / 2 + 2, and their mean before them
    made[:, 0].sum().backward()
    assert clip.grad is not None
    assert clip.grad[..., 0].tolist() == [[0.0, 0.25, 0.25, 0.0, 0.25, 0.25]]
    assert end.times.grad is not None
    assert end.times.grad[:, 0].tolist() == [0.5, 0.5]
    assert end(clip[:, :3], 1)[..., 0].tolist() == [[1.5, 1.0, 2.0]]  # an image has no mark
