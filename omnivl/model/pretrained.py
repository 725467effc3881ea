"""Weights from Hugging Face checkpoints: ViT and TimeSformer into the visual encoder, BERT into text and decoders.

Shapes: D hidden size, N patches of a frame.

Only formats that cannot run code are read: safetensors, and torch files with ``weights_only``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omnivl.errors import ModelError
from omnivl.model.chain import Chain
from omnivl.model.embed import resize_positions, resize_times
from omnivl.model.pretrained_names import Architecture, Stack, detect, translate

SPATIAL, TEMPORAL = "embed.block.visual.positions", "embed.block.visual.times"
WORDS, TEXT_POSITIONS = "embed.block.text.words", "embed.block.text.positions"


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's weights.

    Attributes:
        architecture: ``vit``, ``timesformer`` or ``bert``.
        matched: Our parameters that took a value.
        resized: Those of them whose value was interpolated or cut, with both shapes.
        missing: Our parameters in the loaded parts for which the checkpoint has nothing; they keep their values.
        unexpected: The checkpoint's tensors that found no place.
    """

    architecture: Architecture
    matched: tuple[str, ...]
    resized: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"{self.architecture}: {len(self.matched)} parameters matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected",
            *(f"  resized {name}: {change}" for name, change in self.resized.items()),
            *(f"  missing {name}" for name in self.missing),
            *(f"  unexpected {name}" for name in self.unexpected),
        ]


def load_pretrained(chain: Chain, path: Path, stacks: Sequence[Stack] = ("text",)) -> LoadReport:
    """Copies a checkpoint's weights into the chain, before a host shards it; momentum twins follow.

    Pixels are normalised by mean and deviation 0.5, as Google's ViTs expect.

    Args:
        chain: Where to; changed in place.
        path: A folder as ``save_pretrained`` writes it, or one weight file.
        stacks: Which stacks a BERT goes into; decoders lack cross-attention in it, which then stays as it is.

    Raises:
        ModelError: The file cannot be read, is of no known architecture, or has other widths than the chain.
    """
    weights = read_weights(path)
    architecture = detect(weights)
    if architecture is None:
        raise ModelError(
            f"{path}: neither ViT, TimeSformer nor BERT, first names: {', '.join(sorted(weights)[:5])}; "
            "give the checkpoint of one of these classes"
        )
    translated = translate(weights, architecture, stacks)
    parameters = {name: p for name, p in chain.named_parameters() if "momentum_" not in name}
    resized: dict[str, str] = {}
    matched = [name for name in translated.tensors if name in parameters]
    for name in matched:
        tensor, parameter = translated.tensors[name], parameters[name]
        fitted = fit(name, tensor, parameter, path)
        if fitted.shape != tensor.shape:
            resized[name] = f"{list(tensor.shape)} -> {list(fitted.shape)}"
        with torch.no_grad():
            # Rows behind the checkpoint's own, e.g. added words, keep their values.
            parameter[: len(fitted)].copy_(fitted)
    chain.copy_to_twins()
    parts = (
        ("embed.block.visual", "visual_")
        if architecture != "bert"
        else ("embed.block.text", *map("{}_".format, stacks))
    )
    unplaced = [source for name, sources in translated.sources.items() if name not in parameters for source in sources]
    return LoadReport(
        architecture,
        tuple(matched),
        resized,
        tuple(name for name in parameters if name.startswith(parts) and name not in translated.tensors),
        tuple(sorted({*translated.unused, *unplaced})),
    )


def fit(name: str, tensor: Tensor, parameter: nn.Parameter, path: Path) -> Tensor:
    """Brings a checkpoint's tensor to the parameter's shape.

    Position tables are interpolated (visual) or cut (text); fewer words than the table has rows are fine.

    Raises:
        ModelError: Any other difference.
    """
    wanted = parameter.shape
    if tensor.shape == wanted:
        return tensor
    if tensor.shape[1:] == wanted[1:]:
        if name == SPATIAL:
            side = round((wanted[0] - 1) ** 0.5)
            return torch.cat([tensor[:1], resize_positions(tensor[1:], (side, side))])
        if name == TEMPORAL:
            return resize_times(tensor, wanted[0])
        if name == TEXT_POSITIONS:
            return tensor[: wanted[0]]
        if name == WORDS and len(tensor) < wanted[0]:
            return tensor
    raise ModelError(
        f"{path}: {name} has shape {list(tensor.shape)}, the model needs {list(wanted)}; "
        "choose a preset of the checkpoint's sizes"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a folder or file, fp32, on the CPU.

    Raises:
        ModelError: There is no weight file, or it is damaged.
    """
    files = [path] if path.is_file() else _weight_files(path)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found = load_file(file)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # each format has errors of its own; all mean that the file is no weight file
            raise ModelError(f"{file}: not readable as weights ({error}); fetch it again") from error
        weights |= {name: tensor.float() for name, tensor in found.items() if tensor.is_floating_point()}
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """One file, or all shards that an index names."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index: Path = folder / f"{stem}.index.json"
        if index.exists():
            shards: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / stem).exists():
            return [folder / stem]
    raise ModelError(
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin; give a folder written by save_pretrained "
        "or a weight file"
    )
