import torch

from omnivl.tasks.pixel_baseline import pixel_features


def test_thumbnail_pixels_are_means_of_their_areas() -> None:
    frames = torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8)
    frames[0, 0, 0, :2, :2] = torch.tensor([[0, 255], [255, 255]])  # mean 191.25 = 0.75 of 255
    features = pixel_features(frames, size=2)
    assert features.shape == (1, 12)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0], torch.tensor([0.75] + [0.0] * 11))


def test_chunks_do_not_change_the_result() -> None:
    frames = torch.randint(0, 256, (300, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = pixel_features(frames)
    assert features.shape == (300, 2 * 3 * 16 * 16)
    torch.testing.assert_close(features[299:], pixel_features(frames[299:]))


def test_any_memory_layout_will_do() -> None:
    frames = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 1, 4, 4, 3)
    expected = pixel_features(frames.permute(0, 1, 4, 2, 3).contiguous(), size=2)
    torch.testing.assert_close(pixel_features(frames.permute(0, 1, 4, 2, 3), size=2), expected)
