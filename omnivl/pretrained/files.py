"""Reads weight files of other origin: folders of ``save_pretrained``, and files that training codes wrote themselves.

Only formats that cannot run code are read: safetensors, and torch files with ``weights_only``.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from omnivl.data.plain_files import read_plain_text
from omnivl.errors import ModelError

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "weights")
"""Names under which training codes put the model's weights, beside the optimizer's state, options and counts: ``model``
in ALBEF, BLIP, X-VLM, MAE and timm, ``state_dict`` in Lightning and open_clip, ``module`` in DeepSpeed."""

_PREFIXES = ("module.", "_orig_mod.")
"""What torch's parallel and compiled modules put before every name."""

_MOST_WRAPPERS = 4

_FOREIGN_OBJECT = re.compile(r"Unsupported global: GLOBAL (\S+)")


def read_weights(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Reads all tensors of a folder or file, fp32, on the CPU.

    Mappings around the weights are taken off (``WRAPPERS``), and so is a prefix that all names have; what is no tensor
    beside them is left out.

    Args:
        path: The folder or file.
        shapes_only: Reads names and shapes; the tensors are on the meta device.

    Raises:
        ModelError: There is no weight file, or it is damaged, or it does not say which of its tensors are the model's.
    """
    if path.is_file():
        return read_file(path, shapes_only=shapes_only)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{stem}.index.json").exists():
            return _without_prefix(_of_index(index, shapes_only))
        if (path / stem).exists():
            return read_file(path / stem, shapes_only=shapes_only)
    raise ModelError(
        f"{path}: holds neither model.safetensors nor pytorch_model.bin; give a folder written by save_pretrained "
        "or a weight file"
    )


def read_file(file: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """The weights of one file; see ``read_weights``.

    Raises:
        ModelError: See ``read_weights``.
    """
    weights = _tensors(_unwrapped(_content(file, shapes_only), str(file)))
    if not weights:
        raise ModelError(f"{file}: got a file without weights; allowed are tensors by their names; give another file")
    return _without_prefix(weights)


def _content(file: Path, shapes_only: bool) -> Any:
    """What a file holds; tensors on the meta device where only their shapes are wanted.

    Raises:
        ModelError: It cannot be read.
    """
    if not file.is_file():
        raise ModelError(
            f"{file}: got what is no plain file, or is not there; allowed is a weight file; fetch it again"
        )
    try:
        if file.suffix == ".safetensors":
            return _shapes(file) if shapes_only else load_file(file)
        # Options as argparse has them lie beside the weights of MAE and timm; they are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except Exception as error:  # each format raises other errors; all mean that the file is no weight file
        raise ModelError(
            f"{file}: not readable as weights ({_reason(file, error)}); fetch it again, or save its mapping of tensors "
            "by itself"
        ) from error


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read. Of torch's own words, which advise to run what lies in it, only the fact is kept."""
    said = " ".join(str(error).split())[:300]
    if (found := _FOREIGN_OBJECT.search(str(error))) is not None:
        return f"it holds a {found.group(1)}, an object of Python's rather than a tensor, which is not loaded"
    if file.suffix == ".safetensors":
        return said
    return (
        "it is empty" if file.stat().st_size == 0 else f"no file of torch.save: {type(error).__name__} {said}".strip()
    )


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: its header is read, and compared with its length."""
    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt", device="cpu") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            part = stored.get_slice(name)
            floating = part.get_dtype().startswith(("F", "BF"))
            dtype = torch.float32 if floating else torch.int64
            found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return found


def _unwrapped(content: Any, where: str) -> Mapping[Any, Any]:
    """The mapping that holds the model's weights.

    Raises:
        ModelError: There is none, or several.
    """
    for _ in range(_MOST_WRAPPERS):
        if not isinstance(content, Mapping):
            break
        nested = [name for name, value in content.items() if _holds_tensors(value)]
        wrappers = [name for name in nested if name in WRAPPERS]
        if len(wrappers) > 1 or (nested and not wrappers and not _tensors(content)):
            raise ModelError(
                f"{where}: got tensors under {', '.join(map(repr, wrappers or nested))}; allowed is one of "
                f"{', '.join(map(repr, WRAPPERS))}; save the one that is meant by itself"
            )
        if not wrappers:
            return content
        content, where = content[wrappers[0]], f"{where}: {wrappers[0]}"
    kind = type(content).__name__
    raise ModelError(
        f"{where}: got a {kind}; allowed are tensors by their names; save the model's state_dict by itself"
    )


def _holds_tensors(value: object, depth: int = _MOST_WRAPPERS) -> bool:
    """Whether a value is a mapping with tensors in it, or in mappings in it."""
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(one, Tensor) or _holds_tensors(one, depth - 1) for one in value.values())


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The floating-point tensors of a mapping that have a name, fp32."""
    return {
        name: value.detach().float()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without a prefix of ``_PREFIXES`` that all have; a lone number beside them does not count."""
    while True:
        named = [name for name, tensor in weights.items() if tensor.dim()]
        prefix = next((one for one in _PREFIXES if named and all(name.startswith(one) for name in named)), None)
        if prefix is None:
            return weights
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _of_index(index: Path, shapes_only: bool) -> dict[str, Tensor]:
    """The weights that an index names, each from the file that it names.

    Raises:
        ModelError: The index is none, or a file or a tensor that it names is missing.
    """
    try:
        places: dict[str, str] = json.loads(read_plain_text(index))["weight_map"]
        files = {name: (index.parent / file).name for name, file in places.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: got no index of weight files ({type(error).__name__}: {error}); allowed is a mapping "
            "'weight_map' of names to files beside it; fetch it again"
        ) from error
    if outside := [file for name, file in places.items() if file != files[name]]:
        raise ModelError(f"{index}: got {outside[0]!r}; allowed are files beside it; fetch it again")
    weights: dict[str, Tensor] = {}
    held: set[str] = set()
    for file in sorted(set(files.values())):
        content = _unwrapped(_content(index.parent / file, shapes_only), str(index.parent / file))
        held |= {name for name in content if files.get(name) == file}
        weights |= {name: tensor for name, tensor in _tensors(content).items() if files.get(name, file) == file}
    if absent := sorted(files.keys() - held):
        raise ModelError(
            f"{index}: got {absent[0]!r} ({len(absent)} in all), which {files[absent[0]]} does not hold; allowed are "
            "tensors of the files that it names; fetch it and them again"
        )
    return weights
