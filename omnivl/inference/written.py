"""The memory that a generating decoder attends to, and the layouts in which it runs alone.

Shapes: B samples, T frames, H x W pixels, L text positions, S positions of the memory, D hidden size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from omnivl.chain.chain import Chain, visual_layout
from omnivl.chain.demands import Demands
from omnivl.chain.layout import lay_out
from omnivl.chain.pictures import Pictures
from omnivl.chain.state import State, StepLayout
from omnivl.errors import UserError
from omnivl.inference.predict import asked


def written_layout(chain: Chain, objective: str, rows: int) -> StepLayout:
    """The layout in which an objective's decoder runs alone, on ``rows`` rows with a given ``memory``.

    Raises:
        UserError: The chain has no such objective, or it predicts nothing.
    """
    asks = asked(chain, objective, "image_text", rows)
    return replace(lay_out({objective: asks}, "image_text", rows, 1, "predict"), visual={}, text={}, fused={})


def looked_at(
    chain: Chain, objective: str, frames: Tensor | Pictures, token_ids: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The memory of an objective's decoder: features of images, or states of texts that have attended to them.

    Args:
        chain: A chain with the objective.
        objective: Key of an objective that generates texts.
        frames: uint8 ``[B, T, 3, H, W]``, T = 1 for images; or pictures of their own sizes.
        token_ids: int64 ``[B, L]``, a text for each image, if the decoder attends to one.

    Returns:
        ``[B, S, D]`` in the compute dtype, and bool ``[B, S]``, which positions are not padding; None: all.

    Raises:
        UserError: The chain has no such objective, or it predicts nothing, or the text that it attends to is missing.
    """
    pictures = Pictures.of(frames)
    layout, count = visual_layout(pictures), len(pictures)
    joins = asked(chain, objective, layout.kind, count).joins
    name = next((join.seen[0] for join in joins.values() if join.mask == "causal" and join.seen[0] in joins), None)
    if name is None:
        seen = chain.fold(State(pictures.fields, layout))
        return seen["visual"], seen.get("visual_mask")
    if token_ids is None:
        raise UserError(
            f"generate: got no text for the objective {objective!r}, which writes about images with texts; allowed is "
            "one text for each image, such as its question; give token_ids"
        )
    demands = {objective: Demands(joins={name: joins[name]})}
    fused = lay_out(demands, layout.kind, count, layout.num_frames, "predict")
    rows = torch.arange(count, device=pictures.device)
    given = {**pictures.fields, "token_ids": token_ids, "join/rows": rows}
    state = chain.fold(State(given, replace(fused, objectives=())))
    return state["fused"], state["fused_mask"]
