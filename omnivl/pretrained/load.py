"""Loads weights of Hugging Face checkpoints into the matching parts of a chain.

ViT, TimeSformer, BEiT and CLIP's visual tower are loaded into the visual encoder, BERT into the text encoder and
decoders, BLIP into all of them.

Shapes: D hidden size, N patches of a frame.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from omnivl.architectures import Architecture as ModelArchitecture
from omnivl.architectures import OmniVL
from omnivl.architectures.foreign import OUR_PIXELS, fold_pixels, read_json
from omnivl.chain.chain import Chain
from omnivl.chain.names import stack_of
from omnivl.errors import ModelError, UserError
from omnivl.parts.embed import nearest_times
from omnivl.pretrained.files import read_weights
from omnivl.pretrained.folder import describe, near_misses, unmet_options
from omnivl.pretrained.names import TOKEN_TYPES, Architecture, Stack, Translation, detect, translate

TIMES = "embed.block.visual.times"
BY_WORDS = (
    *("embed.block.text.words", "losses.vocabulary.decoder.weight", "losses.vocabulary.decoder.bias"),
    "language_embed.block.words",
)
"""Our parameters that have a row for each word."""

_BLOCK = re.compile(r"(\w+)_(\d+)\.")

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
        fresh: Blocks of which the checkpoint has nothing, and rows of tables beyond its own; in words.
        differences: Differences between the computations of the checkpoint's model and ours.
    """

    architecture: Architecture | Literal["its own"]
    matched: tuple[str, ...]
    resized: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"{self.architecture}: {len(self.matched)} parameters matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected",
            *(f"  differs: {difference}" for difference in self.differences),
            *(f"  keeps its starting values: {one}" for one in self.fresh),
            *(f"  resized {name}: {change}" for name, change in self.resized.items()),
            *(f"  missing {name}" for name in self.missing),
            *(f"  unexpected {name}" for name in self.unexpected),
        ]


def load_pretrained(
    chain: Chain,
    model: ModelArchitecture,
    path: Path,
    stacks: Sequence[Stack] = ("text",),
    *,
    part: Part = "all",
    shapes_only: bool = False,
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
        shapes_only: Compares names and shapes; the chain is on the meta device, and values are not looked at.

    Raises:
        ModelError: The file cannot be read, is of no known architecture, has other widths than the chain or no weights
            of the part, or its model computes something that the configured chain does not.
    """
    weights = read_weights(path, shapes_only=shapes_only)
    try:
        with torch.device("meta") if shapes_only else nullcontext():
            return _load(chain, model, path, weights, stacks, part)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        # Names are translated in the belief that a checkpoint of a class has all tensors of the class, in its shapes.
        raise ModelError(
            f"{path}: got weights that are not whole ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "allowed are all tensors of one of transformers' classes and its config.json; fetch them again"
        ) from error


def _load(
    chain: Chain,
    model: ModelArchitecture,
    path: Path,
    weights: Mapping[str, Tensor],
    stacks: Sequence[Stack],
    part: Part,
) -> LoadReport:
    """See ``load_pretrained``."""
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
    if architecture == "bert" and not any(name.endswith(TOKEN_TYPES) for name in weights):
        differences.append("no token types in the checkpoint: its positions are taken without them")
    parameters = {name: p for name, p in chain.named_parameters() if "momentum_" not in name}
    matched = [name for name in translated.tensors if name in parameters]
    if not matched:
        raise ModelError(
            f"{path}: got a checkpoint of {architecture}, which has nothing for {part}; allowed there is "
            f"{'BERT or BLIP' if part == 'text' else 'ViT, TimeSformer, BEiT, CLIP or BLIP'}; name it under another key"
        )
    nearest = [TIMES] if architecture == "timesformer" else []
    resized, rows = _copy(chain, {name: translated.tensors[name] for name in matched}, path, nearest)
    for name in translated.zeros:
        nn.init.zeros_(parameters[name])
    chain.copy_to_twins()
    unplaced = [source for name, sources in translated.sources.items() if name not in parameters for source in sources]
    filled = {*translated.tensors, *translated.zeros}
    parts = {_part_of(name) for name in filled}
    wanted = [name for name in parameters if _part_of(name) in parts]
    return LoadReport(
        architecture,
        (*matched, *translated.zeros),
        resized,
        tuple(name for name in wanted if name not in filled),
        tuple(sorted({*translated.unused, *unplaced})),
        (*_fresh_blocks(wanted, filled), *rows),
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
    own = {name: one for name, one in _tensors(chain).items() if "momentum_" not in name}
    parameters = {name: p for name, p in own.items() if name.startswith(PARTS[part])}
    given = {name: tensor for name, tensor in found.items() if name in parameters or name not in own}
    matched = [name for name in given if name in parameters]
    resized, rows = _copy(chain, {name: given[name] for name in matched}, path)
    chain.copy_to_twins()
    missing = tuple(name for name in parameters if name not in given and not name.startswith("losses."))
    unexpected = tuple(sorted(given.keys() - parameters.keys()))
    fresh = (*_fresh_blocks(parameters, given.keys()), *rows)
    return LoadReport("its own", tuple(matched), resized, missing, unexpected, fresh)


def _tensors(chain: Chain) -> dict[str, Tensor]:
    """The parameters, and buffers outside of heads: running statistics."""
    buffers = {name: one for name, one in chain.named_buffers() if not name.startswith("losses.")}
    return {**dict(chain.named_parameters()), **buffers}


def _tensor(chain: Chain, name: str) -> Tensor:
    """One of these."""
    module, _, leaf = name.rpartition(".")
    found: Tensor = getattr(chain.get_submodule(module), leaf)
    return found


def _copy(
    chain: Chain, tensors: Mapping[str, Tensor], path: Path, nearest: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Copies tensors into the chain's parameters of their names.

    Args:
        chain: Takes them.
        tensors: By name of the parameter.
        path: For messages.
        nearest: Tables of times that take the nearest time where their number differs.

    Returns:
        Which were resized, and of which tables some rows keep their values.

    Raises:
        ModelError: A tensor has a shape that does not fit, or a value that is not finite.
    """
    resized: dict[str, str] = {}
    fresh: list[str] = []
    for name, tensor in tensors.items():
        parameter = _tensor(chain, name)
        fitted = fit(chain, name, nearest_times(tensor, len(parameter)) if name in nearest else tensor, path)
        if not fitted.is_meta and not bool(fitted.isfinite().all()):
            raise ModelError(f"{path}: {name} has values that are not finite; allowed are numbers; fetch it again")
        if fitted.shape != tensor.shape:
            resized[name] = f"{list(tensor.shape)} -> {list(fitted.shape)}"
        same = not fitted.is_meta and torch.equal(fitted[: len(tensor)], tensor)
        rows = len(tensor) if same else len(fitted)  # else interpolated
        if rows < len(parameter):
            fresh.append(f"rows {rows} to {len(parameter) - 1} of {name}, of which the checkpoint has {rows}")
        with torch.no_grad():
            # Rows after the checkpoint's rows, e.g. added words, keep their values.
            parameter[: len(fitted)].copy_(fitted)
    return resized, fresh


def _fresh_blocks(parameters: Collection[str], filled: Collection[str]) -> list[str]:
    """The blocks of ``parameters`` of which nothing was filled, by stack; in words."""
    blocks: dict[str, dict[int, bool]] = defaultdict(dict)
    for name in parameters:
        if found := _BLOCK.match(name):
            of_stack, block = blocks[found[1]], int(found[2])
            of_stack[block] = of_stack.get(block, False) or name in filled
    said = []
    for stack, given in blocks.items():
        if lacking := sorted(block for block, has in given.items() if not has):
            joined = len(lacking) > 1 and lacking[-1] - lacking[0] == len(lacking) - 1
            which = f"{lacking[0]} to {lacking[-1]}" if joined else ", ".join(map(str, lacking))
            said.append(f"{stack} blocks {which} of {len(given)}, of which the checkpoint has {sum(given.values())}")
    return said


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
    if first == "embed":  # of the stack that reads it: embed.block.text.words
        return name.split(".")[2]
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
    own = _tensor(chain, name)
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


def read_exported(path: Path, part: Part, *, shapes_only: bool = False) -> dict[str, Tensor] | None:
    """The weights of a folder that ``omnivl export`` wrote, by our names; None for folders of other origin.

    Args:
        path: The folder.
        part: Which of them; ``all`` includes heads, decoders and the temperature.
        shapes_only: See ``read_weights``.

    Raises:
        ModelError: See ``read_weights``.
    """
    if read_json(path / "config.json").get("model_type") != "omnivl":
        return None
    names = PARTS[part]
    weights = {
        name.removeprefix("chain."): tensor for name, tensor in read_weights(path, shapes_only=shapes_only).items()
    }
    return {name: tensor for name, tensor in weights.items() if name.startswith(names)}
