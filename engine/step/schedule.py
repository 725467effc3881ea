"""The learning rate over the steps of a stage, as a pure function of the step."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int, total_steps: int, *, schedule: Schedule, warmup_steps: int = 0, final_ratio: float = 0.0
) -> float:
    """What the peak learning rate is multiplied by in one optimizer step.

    Warm-up rises linearly: step ``s`` gets ``(s + 1) / warmup_steps``, so the first step is not wasted on a rate of 0
    and the peak is reached in step ``warmup_steps - 1``. The decay then falls from 1 in step ``warmup_steps`` to
    ``final_ratio`` at ``total_steps``, one step after the last.

    Args:
        step: Optimizer step from 0. Steps from ``total_steps`` on stay at the final value.
        total_steps: Optimizer steps of the stage, warm-up included.
        schedule: Shape after the warm-up.
        warmup_steps: Steps of linear rise; 0 for none.
        final_ratio: Final rate over peak rate for ``linear`` and ``cosine``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_ratio + (1.0 - final_ratio) * remaining
