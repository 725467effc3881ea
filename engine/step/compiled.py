"""Compiled blocks (``parallel.compile``)."""

from typing import Any

import torch

from omnivl.chain.chain import Chain
from omnivl.parts.block import BlockLayer

_FORMS = 64
"""Forms of one block (kinds of batches, with and without gradients) beyond which ``torch.compile`` gives up on it."""


def compile_blocks(chain: Chain, **options: Any) -> None:
    """Has ``torch.compile`` compile every block of a chain. States and layouts stay outside: they are Python objects.

    What is drawn at random, as dropout and routers' noise, is drawn as without compiling.

    Args:
        chain: Of the host that trains it.
        options: Of ``torch.compile``.
    """
    from torch._inductor import config as inductor  # the compiler, which few runs import

    torch._dynamo.config.recompile_limit = _FORMS
    inductor.fallback_random = True
    for layer in chain.layers:
        layer.drops_padding = False  # for every number of positions blocks would be compiled anew
        if isinstance(layer, BlockLayer):
            layer.compile_blocks(**options)
