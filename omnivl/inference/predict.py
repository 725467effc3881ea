"""Predictions of an objective's head for images or clips with texts.

Shapes: B samples, T frames, H x W pixels, R texts, L text positions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from omnivl.chain.chain import Chain, visual_layout
from omnivl.chain.demands import Demands
from omnivl.chain.layout import lay_out
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State
from omnivl.data.batch import DataKind
from omnivl.errors import UserError


def predict(
    chain: Chain,
    objective: str,
    frames: Tensor | Pictures,
    token_ids: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Runs the chain and an objective's ``predict``.

    Args:
        chain: A chain with the objective's head.
        objective: Key of the objective.
        frames: uint8 ``[B, T, 3, H, W]``, T = 1 for images; or pictures of their own sizes. Each is encoded once,
            however many texts go with it.
        token_ids: int64 ``[R, L]``, the texts; None if the objective predicts from images alone.
        rows: int64 ``[R]``, the image that goes with each text; None: text i goes with image i.

    Returns:
        The result of the objective's ``predict``, one row for each text, or for each image if there are no texts. For
        ``vlm``: fp32 ``[R]``, log odds that text and image belong together.

    Raises:
        UserError: The chain has no such objective, or it predicts nothing.
    """
    count = len(frames) if token_ids is None else len(token_ids)
    pictures = Pictures.of(frames)
    layout = visual_layout(pictures)
    asks = asked(chain, objective, layout.kind, count)
    # Texts may outnumber images; the images keep a separate layout.
    layout = replace(lay_out({objective: asks}, layout.kind, count, layout.num_frames, "predict"), visual=layout.visual)
    given = pictures.fields
    if token_ids is not None:
        rows = torch.arange(count, device=token_ids.device) if rows is None else rows
        given |= {"token_ids": token_ids, "join/rows": rows}
    return chain.fold(State(given, layout))[f"{objective}/prediction"]


def asked(chain: Chain, objective: str, kind: DataKind, count: int) -> Demands:
    """The demands of an objective's prediction.

    Args:
        chain: A chain with the objective's head.
        objective: Key of the objective.
        kind: Kind of the data.
        count: Number of rows.

    Raises:
        UserError: The chain has no such objective, or it predicts nothing.
    """
    known = chain.objectives
    if objective in known and (asks := known[objective].asks(kind, count)) is not None:
        return asks
    able = [repr(key) for key, one in known.items() if one.asks(kind, count) is not None]
    raise UserError(
        f"predict: got the objective {objective!r}; allowed are those of the stage that predict "
        f"({', '.join(able) or 'none'}); name one of them, or use a stage that trains it"
    )
