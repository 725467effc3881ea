"""The visual encoder without a temporal branch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from omnivl.chain.state import State, StepLayout
from omnivl.parts.plain_vit import ImageBlock, ImageEmbedding, frame_tokens
from omnivl.parts.project import embed
from omnivl.parts.sizes import Patches, Transformer
from omnivl.parts.vit import VisualBlock

SIZES = Transformer(hidden_size=8, num_heads=2, layers=2, layer_scale_init=0.5)
PATCHES = Patches(image_size=8, video_size=8, num_frames=32, patch_size=4, tubelet_size=1, norm_embeddings=True)
FRAMES = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_patches_are_a_convolution_without_bias() -> None:
    embedding = ImageEmbedding(replace(PATCHES, norm_embeddings=False), SIZES, bias=False)
    pixels = FRAMES[:, 0].float() / 127.5 - 1
    convolved = F.conv2d(pixels, embedding.patches.weight.view(8, 3, 4, 4), stride=4).flatten(2).transpose(1, 2)
    out = embedding(FRAMES[:, :1], torch.float32)
    torch.testing.assert_close(out[:, 1:], convolved + embedding.positions[1:])
    torch.testing.assert_close(out[:, 0], (embedding.class_token + embedding.positions[0]).expand(2, -1))


@pytest.mark.parametrize("first_only", [False, True])
def test_frames_of_a_clip_are_encoded_as_images(first_only: bool) -> None:
    torch.manual_seed(0)
    embedding, block = ImageEmbedding(PATCHES, SIZES), ImageBlock(SIZES, PATCHES, 1)
    clip = block(embedding(FRAMES, torch.float32), 3, True, first_only).y
    images = [
        block(embedding(FRAMES[:, i : i + 1], torch.float32), 1, False, first_only).y for i in range(FRAMES.shape[1])
    ]
    torch.testing.assert_close(clip, torch.cat(images, dim=1))
    projection = torch.nn.Linear(8, 4)
    layout = StepLayout("video_text", 2, 3, "encode", visual={"clean": slice(0, 2)})
    pooled = embed(projection, frame_tokens(clip, State({}, layout)))
    mean = torch.stack([F.normalize(projection(image[:, 0]), dim=-1) for image in images]).mean(0)
    torch.testing.assert_close(pooled, F.normalize(mean, dim=-1))


def test_class_tokens_alone_are_those_of_the_whole_block() -> None:
    torch.manual_seed(0)
    block, x = ImageBlock(SIZES, PATCHES, 0), torch.randn(2, 3 * 5, 8)
    whole = block(x, 3, True).y.view(2, 3, 5, 8)[:, :, 0]
    torch.testing.assert_close(block(x, 3, True, first_only=True).y, whole)


def test_no_parameter_is_idle_without_clips() -> None:
    layer = VisualBlock(0, SIZES, PATCHES, block=ImageBlock)
    layout = StepLayout("image_text", 2, 1, visual={"clean": slice(0, 2)})
    assert not list(layer.idle_parameters([layout]))
    assert not [name for name, _ in layer.named_parameters() if "temporal" in name]


def test_positions_of_another_grid_are_interpolated() -> None:
    large = ImageEmbedding(replace(PATCHES, image_size=16), SIZES)
    small = ImageEmbedding(PATCHES, SIZES)
    resized = small.resize("positions", large.positions.detach(), small.positions)
    assert resized is not None
    assert resized.shape == small.positions.shape
    torch.testing.assert_close(resized[0], large.positions[0])
