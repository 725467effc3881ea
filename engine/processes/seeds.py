"""Seeds and states of the three global random generators: torch (and CUDA), NumPy, Python.

Data needs none of them (see ``omnivl.randomness``); initial weights, dropout and drop path do.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from omnivl.randomness import stable_hash


def seed_everything(*key: int | str) -> None:
    """Seeds all global generators with a pure function of ``key``.

    Args:
        key: Identifies the use, e.g. ``(plan.seed, "stage", 0, "replica", 1)``.
    """
    random.seed(stable_hash("python", *key))
    np.random.seed(stable_hash("numpy", *key) % 2**32)
    torch.manual_seed(stable_hash("torch", *key))


def generator_states() -> dict[str, Any]:
    """Returns the states of all global generators, as JSON has it."""
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Puts back what ``generator_states`` returned. Lists of numbers may be tensors, as in checkpoints of format 2."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.asarray(keys).astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.as_tensor(states["torch"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.as_tensor(states["cuda"], dtype=torch.uint8))
