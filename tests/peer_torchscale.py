"""torchscale without timm and fairscale: tests use neither its drop path nor its sharding."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest

_NEEDED = {"fairscale.nn": ("checkpoint_wrapper", "wrap"), "timm.models.layers": ("drop_path",)}


def import_torchscale(module: str) -> Any:
    """A module of the package; skips the test where the package is not installed."""
    if importlib.util.find_spec("torchscale") is None:
        pytest.skip("torchscale is not installed: pip install --no-deps torchscale")
    stand_ins: dict[str, ModuleType] = {}
    for name, members in _NEEDED.items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            continue
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            stand_ins.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        for member in members:
            setattr(stand_ins[name], member, None)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]
