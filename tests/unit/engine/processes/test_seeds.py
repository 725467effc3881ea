import json
import random

import numpy as np
import torch

from engine.processes.seeds import generator_states, restore_generators, seed_everything


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)


def test_seed_is_a_function_of_the_key() -> None:
    seed_everything(0, "stage", 1, "replica", 0)
    first = draw()
    seed_everything(0, "stage", 1, "replica", 0)
    assert draw() == first
    seed_everything(0, "stage", 1, "replica", 1)
    assert all(one != other for one, other in zip(draw(), first, strict=True))


def test_states_survive_a_file() -> None:
    seed_everything(5)
    draw()  # leaves half a pair of Gaussians behind
    np.random.randn()
    states = json.dumps(generator_states())
    expected = draw(), float(np.random.randn())
    restore_generators(json.loads(states))
    assert (draw(), float(np.random.randn())) == expected
