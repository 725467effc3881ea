"""Models of another library: reading the files beside the weights in its folders, and the content to write into one.

Shapes: D hidden size, C values of a patch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.data.plain_files import read_plain_text
from omnivl.errors import ModelError


@dataclass(frozen=True)
class Pixels:
    """How the channels of pixels in [0, 1] are normalised.

    Attributes:
        mean: Subtracted first.
        std: Divisor after that.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


CLIP_PIXELS = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OUR_PIXELS = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Foreign:
    """A model as a class of ``transformers``, for a folder that loads without this package.

    Attributes:
        model: Name of the class.
        config: Content of ``config.json``.
        weights: All parameters of the class, by its names.
        image_processor: Content of ``preprocessor_config.json``.
        left_out: Parameters of the model that the class has no place for, by our names.
    """

    model: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    image_processor: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if there is no such file.

    Raises:
        ModelError: It is no plain file, or holds no JSON mapping.
    """
    if not file.exists():
        return {}
    try:
        read: dict[str, Any] = json.loads(read_plain_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: got a file that is no JSON ({error}); fetch it again") from error
    if not isinstance(read, dict):
        kind = type(read).__name__
        raise ModelError(f"{file}: got JSON of a {kind}; allowed is a mapping; fetch it again")
    return read


def read_pixels(folder: Path, usual: Pixels) -> Pixels:
    """The normalisation of a folder's image processor; ``usual`` if there is none.

    Raises:
        ModelError: Its file is not JSON.
    """
    said = read_json(folder / "preprocessor_config.json") or read_json(folder / "processor_config.json").get(
        "image_processor", {}
    )
    if not said.get("do_normalize", True):
        usual = Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Pixels(tuple(said.get("image_mean", usual.mean)), tuple(said.get("image_std", usual.std)))


def fold_pixels(weight: Tensor, bias: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """The patch embedding for our pixels (mean and deviation 0.5) with the same output as before for its own.

    With x = (0.5 (p + 1) - mean) / std, W x + b = (0.5 W / std) p + b + sum(W (0.5 - mean) / std).

    Args:
        weight: ``[D, C]``, channel by channel.
        bias: ``[D]``.
        pixels: How the weights' own pixels are normalised.
    """
    channels = weight.view(len(weight), 3, -1).double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (pixels.mean, pixels.std))
    folded = channels * (0.5 / std)
    shift = (channels * ((0.5 - mean) / std)).sum((1, 2))
    return folded.flatten(1).to(weight.dtype), (bias.double() + shift).to(bias.dtype)
