"""Pictures that an objective draws, from texts and beside pictures.

Shapes: B pictures, N patches of a picture, L text positions, W width of a part (see ``omnivl.objectives.diffusion``).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from omnivl.chain.chain import Chain
from omnivl.chain.layout import lay_out
from omnivl.chain.state import State
from omnivl.data.batch import DataKind
from omnivl.errors import UserError
from omnivl.inference.predict import asked
from omnivl.objectives.diffusion import Diffusion, DiffusionHead
from omnivl.randomness import Streams


def draw(
    chain: Chain,
    objective: str,
    token_ids: Tensor,
    noise: Tensor,
    frames: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Draws a picture for each text.

    Args:
        chain: A chain with the objective's head.
        objective: Key of an objective that draws.
        token_ids: int64 ``[B, L]``.
        noise: fp32 ``[B, N, W]``, from ``starting_noise``.
        frames: uint8 ``[B, 1, 3, H, W]``, pictures of which parts are kept; None for none.
        kept: bool ``[B, N]``, which patches of them are; others are drawn anew.

    Returns:
        uint8 ``[B, 3, H, W]``.

    Raises:
        UserError: The chain has no such objective.
    """
    kind: DataKind = "text" if frames is None else "image_text"
    layout = lay_out({objective: asked(chain, objective, kind, len(token_ids))}, kind, len(token_ids), 1, "predict")
    given = {"token_ids": token_ids, f"{objective}/noise": noise}
    if frames is not None:
        assert kept is not None, "parts of pictures are kept, or there are no pictures"
        given |= {"frames": frames, f"{objective}/kept": kept}
    return chain.fold(State(given, layout))[f"{objective}/prediction"]


def noise_shape(chain: Chain, objective: str) -> tuple[int, int]:
    """N and W of an objective's noise.

    Raises:
        UserError: The chain has no objective of that key that draws.
    """
    if isinstance(chain.objectives.get(objective), Diffusion):
        head = chain.get_submodule(f"losses.heads.{objective}")
        assert isinstance(head, DiffusionHead)
        return head.grid**2, head.width
    able = ", ".join(repr(key) for key, one in chain.objectives.items() if isinstance(one, Diffusion)) or "none"
    raise UserError(
        f"draw: got the objective {objective!r}; allowed are those of the stage that draw ({able}); name one of them, "
        "or use a stage that trains one of kind 'diffusion'"
    )


def starting_noise(places: Sequence[int], shape: tuple[int, int], seed: int) -> Tensor:
    """Noise of drawings, fp32 ``[len(places), N, W]``, a function of each one's place and the seed alone."""
    noise = np.empty((len(places), *shape), dtype=np.float32)
    streams = Streams(seed, "drawings")
    for own, place in zip(noise, places, strict=True):
        streams.at(place).standard_normal(out=own, dtype=np.float32)
    return torch.from_numpy(noise)


def kept_outside(region: tuple[float, float, float, float], grid: tuple[int, int]) -> Tensor:
    """Which patches no part of a region covers, bool ``[N]``, row by row.

    Args:
        region: Left, top, right and bottom as shares of width and height.
        grid: Rows and columns of patches.
    """
    (left, top, right, bottom), (rows, columns) = region, grid
    down, across = torch.arange(rows), torch.arange(columns)
    inside_rows = (down + 1 > top * rows) & (down < bottom * rows)
    inside_columns = (across + 1 > left * columns) & (across < right * columns)
    return ~(inside_rows[:, None] & inside_columns).flatten()
