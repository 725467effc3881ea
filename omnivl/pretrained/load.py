"""Loads weights of Hugging Face checkpoints into the matching parts of a chain.

ViT, TimeSformer, BEiT and CLIP's visual tower are loaded into the visual encoder, BERT into the text encoder and
decoders, BLIP into all of them.

Shapes: D hidden size, N patches of a frame.

Only formats that cannot run code are read: safetensors, and torch files with ``weights_only``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omnivl.architectures import Architecture as ModelArchitecture
from omnivl.architectures import OmniVL
from omnivl.architectures.foreign import OUR_PIXELS, fold_pixels, read_json
from omnivl.chain.chain import Chain
from omnivl.chain.names import stack_of
from omnivl.errors import ModelError
from omnivl.parts.embed import nearest_times
from omnivl.pretrained.folder import describe, near_misses, unmet_options
from omnivl.pretrained.names import Architecture, Stack, Translation, detect, translate

BY_WORDS = (
    *("embed.block.text.words", "losses.vocabulary.decoder.weight", "losses.vocabulary.decoder.bias"),
    "language_embed.block.words",
)
"""Our parameters that have a row for each word."""

Part = Literal["all", "vision", "text", "language"]
PARTS: Mapping[Part, tuple[str, ...]] = {
    "all": ("",),
    "vision": ("embed.block.visual", "visual_", "contrast.visual_projection"),
    "text": ("embed.block.text", "text_", "qformer_", "contrast.text_projection"),
    "language": ("language_",),
}
"""Prefixes of the names of our parameters that belong to a part."""

_OTHER_SIDE: Mapping[Part, tuple[str, ...]] = {"vision": ("text_",), "text": ("vision_", "visual_")}


@dataclass(frozen=True)
class LoadReport:
    """The result of loading a checkpoint's weights.

    Attributes:
        architecture: The checkpoint's architecture.
        matched: Our parameters that were loaded.
        resized: Those of them that were interpolated, cut or lengthened, with both shapes.
        missing: Our parameters in the loaded parts for which the checkpoint has nothing; they keep their values.
        unexpected: The checkpoint's tensors that were not loaded.
        differences: Differences between the computations of the checkpoint's model and ours.
    """

    architecture: Architecture | Literal["its own"]
    matched: tuple[str, ...]
    resized: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differences: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"{self.architecture}: {len(self.matched)} parameters matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected",
            *(f"  differs: {difference}" for difference in self.differences),
            *(f"  resized {name}: {change}" for name, change in self.resized.items()),
            *(f"  missing {name}" for name in self.missing),
            *(f"  unexpected {name}" for name in self.unexpected),
        ]


def load_pretrained(
    chain: Chain, model: ModelArchitecture, path: Path, stacks: Sequence[Stack] = ("text",), *, part: Part = "all"
) -> LoadReport:
    """Copies a checkpoint's weights into the chain, before a host shards it; momentum twins follow.

    Our pixels are normalised by mean and deviation 0.5; another normalisation, of the folder's processor or usual for
    its kind, is folded into the patch embedding.

    Args:
        chain: Changed in place.
        model: Its configuration.
        path: A folder as ``save_pretrained`` writes it, or one weight file.
        stacks: The stacks into which a BERT is loaded; it has no cross-attention, so that of decoders keeps its values.
        part: The part of the chain that is loaded.

    Raises:
        ModelError: The file cannot be read, is of no known architecture, has other widths than the chain or no weights
            of the part, or its model computes something that the configured chain does not.
    """
    weights = read_weights(path)
    if (own := model.from_foreign(weights, path)) is not None:
        return _filled(chain, own, path, part)
    architecture = detect(weights) if isinstance(model, OmniVL) else None
    if not isinstance(model, OmniVL):
        raise ModelError(
            f"{path}: got weights that architecture {model.kind!r} does not know, first names: "
            f"{', '.join(sorted(weights)[:5])}; give the checkpoint of one of its classes"
        )
    if architecture is None:
        raise ModelError(
            f"{path}: neither ViT, TimeSformer, BEiT, BERT, CLIP nor BLIP, first names: "
            f"{', '.join(sorted(weights)[:5])}; give the checkpoint of one of these classes"
        )
    _refuse_text_of_clip(path, architecture, weights, part)
    translated = _of_part(translate(weights, architecture, stacks), part)
    differences = _check_options(model, path, architecture, translated)
    parameters = {name: p for name, p in chain.named_parameters() if "momentum_" not in name}
    resized: dict[str, str] = {}
    matched = [name for name in translated.tensors if name in parameters]
    if not matched:
        raise ModelError(
            f"{path}: got a checkpoint of {architecture}, which has nothing for {part}; allowed there is "
            f"{'BERT or BLIP' if part == 'text' else 'ViT, TimeSformer, BEiT, CLIP or BLIP'}; name it under another key"
        )
    for name in matched:
        tensor, parameter = translated.tensors[name], parameters[name]
        as_theirs = architecture == "timesformer" and name == "embed.block.visual.times"
        fitted = fit(chain, name, nearest_times(tensor, len(parameter)) if as_theirs else tensor, path)
        if fitted.shape != tensor.shape:
            resized[name] = f"{list(tensor.shape)} -> {list(fitted.shape)}"
        with torch.no_grad():
            # Rows after the checkpoint's rows, e.g. added words, keep their values.
            parameter[: len(fitted)].copy_(fitted)
    for name in translated.zeros:
        nn.init.zeros_(parameters[name])
    chain.copy_to_twins()
    unplaced = [source for name, sources in translated.sources.items() if name not in parameters for source in sources]
    filled = {*translated.tensors, *translated.zeros}
    parts = {_part_of(name) for name in filled}
    return LoadReport(
        architecture,
        (*matched, *translated.zeros),
        resized,
        tuple(name for name in parameters if _part_of(name) in parts and name not in filled),
        tuple(sorted({*translated.unused, *unplaced})),
        tuple(differences),
    )


def _refuse_text_of_clip(path: Path, architecture: Architecture, weights: Mapping[str, Tensor], part: Part) -> None:
    has_text = any(name.startswith("text_model.") for name in weights)
    if architecture == "clip" and has_text and part != "vision":
        raise ModelError(
            f"{path}: got CLIP's text tower under weights.{part}; allowed is its visual tower, since our text encoder "
            "reads in both directions and from its first token, CLIP's in one and from its last, without a mask token; "
            "name the folder under weights.vision, and a BERT under weights.text, or set model.kind to clip, which has "
            "both towers of CLIP"
        )


def _of_part(translated: Translation, part: Part) -> Translation:
    """The tensors of a translation that belong to a part."""
    beginnings = PARTS[part]
    return replace(
        translated,
        tensors={name: tensor for name, tensor in translated.tensors.items() if name.startswith(beginnings)},
        sources={name: found for name, found in translated.sources.items() if name.startswith(beginnings)},
        zeros=[name for name in translated.zeros if name.startswith(beginnings)],
        unused=[name for name in translated.unused if not name.startswith(_OTHER_SIDE.get(part, ()))],
    )


def _filled(chain: Chain, found: Mapping[str, Tensor], path: Path, part: Part) -> LoadReport:
    """Copies tensors with the chain's own names into a part of it."""
    own = {name: p for name, p in chain.named_parameters() if "momentum_" not in name}
    parameters = {name: p for name, p in own.items() if name.startswith(PARTS[part])}
    given = {name: tensor for name, tensor in found.items() if name in parameters or name not in own}
    resized: dict[str, str] = {}
    matched = [name for name in given if name in parameters]
    for name in matched:
        fitted = fit(chain, name, given[name], path)
        if fitted.shape != given[name].shape:
            resized[name] = f"{list(given[name].shape)} -> {list(fitted.shape)}"
        with torch.no_grad():
            parameters[name][: len(fitted)].copy_(fitted)
    chain.copy_to_twins()
    missing = tuple(name for name in parameters if name not in given and not name.startswith("losses."))
    unexpected = tuple(sorted(given.keys() - parameters.keys()))
    return LoadReport("its own", tuple(matched), resized, missing, unexpected)


def _check_options(model: OmniVL, path: Path, architecture: Architecture, translated: Translation) -> list[str]:
    """Refuses weights whose model computes something that ours does not; returns small differences.

    The pixels' normalisation is folded into the translation.
    """
    said = describe(path, architecture)
    vision, text = (
        any(name.startswith(f"embed.block.{one}") for name in translated.tensors) for one in ("visual", "text")
    )
    if unmet := unmet_options(said, model, vision=vision, text=text):
        raise ModelError("\n".join(f"{path}: {line}; set it, or give other weights" for line in unmet))
    patches = "embed.block.visual.patches"
    if vision and f"{patches}.weight" in translated.tensors and said.pixels != OUR_PIXELS:
        weight = translated.tensors[f"{patches}.weight"]
        bias = translated.tensors.get(f"{patches}.bias", weight.new_zeros(len(weight)))
        folded = fold_pixels(weight, bias, said.pixels)
        translated.tensors[f"{patches}.weight"], translated.tensors[f"{patches}.bias"] = folded
        if f"{patches}.bias" in translated.zeros:
            translated.zeros.remove(f"{patches}.bias")
    return near_misses(said, model, vision=vision, text=text)


def _part_of(name: str) -> str:
    """The stack, table or head that a parameter of ours belongs to."""
    first, _, rest = name.partition(".")
    if first == "embed":
        return ".".join(name.split(".")[:3])
    if first in ("contrast", "losses"):
        return f"{first}.{rest.rsplit('.', 1)[0]}" if first == "contrast" else ".".join(name.split(".")[:3])
    return stack_of(first)


def fit(chain: Chain, name: str, tensor: Tensor, path: Path) -> Tensor:
    """Converts a checkpoint's tensor to the shape of our parameter of this name.

    Position tables are resized by their layer; tables of words may have fewer rows than ours.

    Raises:
        ModelError: The shapes differ in another way.
    """
    layer, _, inner = name.partition(".")
    own = chain.get_parameter(name)
    if tensor.shape == own.shape:
        return tensor
    if name in BY_WORDS and tensor.shape[1:] == own.shape[1:] and len(tensor) < len(own):
        return tensor
    resized = chain.named_layers[layer].resize(inner, tensor, own.detach())
    if resized is None:
        raise ModelError(
            f"{path}: {name} has shape {list(tensor.shape)}, the model needs {list(own.shape)}; "
            "choose a preset of the checkpoint's sizes"
        )
    return resized


def read_exported(path: Path, part: Part) -> dict[str, Tensor] | None:
    """The weights of a folder that ``omnivl export`` wrote, by our names; None for folders of other origin.

    Args:
        path: The folder.
        part: Which of them; ``all`` includes heads, decoders and the temperature.

    Raises:
        ModelError: See ``read_weights``.
    """
    if read_json(path / "config.json").get("model_type") != "omnivl":
        return None
    names = PARTS[part]
    weights = {name.removeprefix("chain."): tensor for name, tensor in read_weights(path).items()}
    return {name: tensor for name, tensor in weights.items() if name.startswith(names)}


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
        except Exception as error:  # each format raises other errors; all mean that the file is no weight file
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
