"""Initialises one filling of the feed-forward slot from the weights of another.

Dense to experts (sparse, or by modality): every expert starts as a copy; noise can make sparse ones different. Experts
to dense: the mean of the experts. The same holds for projections and norms of the unified transformer, one for all, by
modality or with experts by attributes. If a token's weights sum to one (``renormalise``), a layer of equal experts
equals the dense layer.

Shapes: E experts, D hidden size, F inner size.

Source: Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055, section 3.
Differs: noise may be added to the copies, relative to the spread of each matrix.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BANK = re.compile(r"(?P<slot>.*ffn)\.experts\.(?P<layer>fc[12])_(?P<kind>weight|bias)")
_MAP = re.compile(r"(?P<place>.+)\.(?P<own>shared|sides\.\w+|shared\.experts)\.(?P<kind>weight|bias)")
_PERCEPTRON = re.compile(r"(?P<slot>.*ffn)\.(?:experts\.\w+\.)?(?P<layer>fc[12])\.(?P<kind>weight|bias)")


def translated(
    name: str, shape: torch.Size, earlier: Mapping[str, Tensor], noise: float = 0.0, seed: int = 0
) -> Tensor | None:
    """The initial value of a weight, if an earlier model had another filling; None if it has no corresponding weight.

    Args:
        name: The weight, as in a chain: ``visual_00.block.ffn.experts.fc1_weight`` ...
        shape: Its shape.
        earlier: The earlier model's weights by name.
        noise: Deviation of the noise that is added to each expert's matrices of a bank, over the deviation of the
            copied matrix's entries. Biases get none: new ones are all zero, so that their deviation is 0.
        seed: Of the noise.
    """
    if (own := _MAP.fullmatch(name)) is not None:
        return _map(own, shape, earlier)
    bank, perceptron = _BANK.fullmatch(name), _PERCEPTRON.fullmatch(name)
    match = bank or perceptron
    if match is None:
        return None
    slot, layer, kind = match["slot"], match["layer"], match["kind"]
    found = _perceptron(slot, layer, kind, earlier)
    if found is None:
        return None
    if bank is not None:
        stored = _as_stored(found, layer, kind)
        found = stored.expand(shape[0], *stored.shape)
        if noise > 0 and kind == "weight":
            found = found + noise * stored.std(correction=0) * _normal(found.shape, seed).to(found)
    return found if found.shape == shape else None


def _normal(shape: torch.Size, seed: int) -> Tensor:
    """Noise, drawn on the CPU, where it is the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(name: str) -> str | None:
    """The slot or linear map that a weight belongs to, whatever its filling; None for other weights."""
    if ".ffn." in name:
        return f"{name.partition('.ffn.')[0]}.ffn"
    found = re.match(r"(.+)\.(?:shared|sides)\.", name)
    return None if found is None else found[1]


def _map(match: re.Match[str], shape: torch.Size, earlier: Mapping[str, Tensor]) -> Tensor | None:
    """A projection or norm of the unified transformer: one for all, by modality, or with experts by attributes."""
    kind = match["kind"]
    others = re.compile(rf"{re.escape(match['place'])}\.(?:shared|sides\.\w+|shared\.experts)\.{kind}")
    found = [
        tensor.mean(0) if name.endswith(f".experts.{kind}") else tensor
        for name, tensor in earlier.items()
        if others.fullmatch(name)
    ]
    if not found:
        return None
    mean = torch.stack(found).mean(0)
    start = mean.expand(shape[0], *mean.shape) if match["own"] == "shared.experts" else mean
    return start if start.shape == shape else None


def _perceptron(slot: str, layer: str, kind: str, earlier: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of an earlier slot in a dense layer's form: its own, or the mean over its experts."""
    dense = earlier.get(f"{slot}.{layer}.{kind}")
    if dense is not None:
        return dense
    bank = earlier.get(f"{slot}.experts.{layer}_{kind}")
    if bank is not None:
        return _as_stored(bank.mean(0), layer, kind)
    by_modality = re.compile(rf"{re.escape(slot)}\.experts\.\w+\.{layer}\.{kind}")
    found = [tensor for name, tensor in earlier.items() if by_modality.fullmatch(name)]
    return torch.stack(found).mean(0) if found else None


def _turned(layer: str, kind: str) -> bool:
    """Whether a bank stores the transpose of a dense layer's matrix: true for the second matrix."""
    return layer == "fc2" and kind == "weight"


def _as_stored(weight: Tensor, layer: str, kind: str) -> Tensor:
    """From a dense layer's form to a bank's, or back."""
    return weight.t() if _turned(layer, kind) else weight
