"""Models of another library: reading the files beside the weights in its folders, and the content to write into one.

Shapes: D hidden size, C values of a patch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config import DenseConfig
from omnivl.chain.chain import Chain
from omnivl.data.plain_files import read_plain_text
from omnivl.errors import ModelError
from omnivl.parts.sizes import Transformer

Names = Iterable[tuple[str, tuple[str, ...]]]
"""A parameter of ours, and the parameters of another library whose rows it concatenates."""


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


def joined(given: Mapping[str, Tensor], names: Names) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors under our names, of all parameters whose parts are there; and the tensors that are part of none."""
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for ours, parts in names:
        if all(part in given for part in parts):
            found[ours] = torch.cat([given[part] for part in parts]) if len(parts) > 1 else given[parts[0]]
            taken.update(parts)
    return found, {name: tensor for name, tensor in given.items() if name not in taken}


def divided(own: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Copies of our tensors under another library's names; the reverse of ``joined``."""
    found: dict[str, Tensor] = {}
    for ours, parts in names:
        pieces = own[ours].chunk(len(parts)) if len(parts) > 1 else (own[ours],)
        found |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return found


def stack_config(stack: Transformer) -> dict[str, Any]:
    """The sizes of a stack, by the names that configurations of ``transformers`` have for them."""
    return {
        "hidden_size": stack.hidden_size,
        "intermediate_size": stack.inner_size,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.num_heads,
        "hidden_act": stack.activation,
        "layer_norm_eps": stack.norm_eps,
    }


def refuse_stack(name: str, stack: Transformer, norm: str, cls: str) -> None:
    """Refuses to export a stack, a configuration's field ``name``, with options that a class lacks.

    Args:
        name: See above.
        stack: The stack.
        norm: The only order of norms that the class has.
        cls: Name of the class.

    Raises:
        ModelError: The stack has experts, LayerScale or the other order.
    """
    if not isinstance(stack.ffn, DenseConfig) or stack.layer_scale_init is not None or stack.norm != norm:
        raise ModelError(
            f"model.{name}: got {stack.ffn.kind!r} feed-forward layers, layer_scale_init {stack.layer_scale_init} and "
            f"norm {stack.norm!r}; allowed are 'dense' ones, null and {norm!r} for transformers' {cls}; leave "
            "--format out"
        )


def refuse_without_words(chain: Chain, cls: str) -> None:
    """Refuses to export a chain without a head on words as a class that has one.

    Raises:
        ModelError: There is none.
    """
    if "losses.vocabulary.decoder.weight" not in chain.state_dict():
        raise ModelError(
            f"the stage has no head on words, which transformers' {cls} needs; allowed are stages with the objective "
            "'lm'; export one of these, or leave --format out"
        )


def unmet(name: str, stack: Transformer, wanted: Mapping[str, object]) -> Iterator[str]:
    """Options of a stack, a configuration's field ``name``, that weights need otherwise, as unfinished messages.

    Args:
        name: See above.
        stack: The stack.
        wanted: What the weights need, by option.
    """
    for option, value in wanted.items():
        if (got := getattr(stack, option)) != value:
            yield f"model.{name}.{option}: got {got!r}; allowed {value!r} with these weights"


def refuse_unmet(path: Path, lines: Iterable[str]) -> None:
    """Refuses weights in ``path`` for what ``unmet`` found.

    Raises:
        ModelError: There is a line.
    """
    if told := [f"{path}: {line}; set it, or give other weights" for line in lines]:
        raise ModelError("\n".join(told))
