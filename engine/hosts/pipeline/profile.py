"""The file by which a pipeline may be cut: what each layer of a chain takes, as ``omnivl profile`` has measured it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnivl.errors import UserError


@dataclass(frozen=True)
class LayerUse:
    """What one layer takes of one micro-batch.

    Attributes:
        seconds: Forward and backward, the mean over the stage's kinds of batches.
        activation_bytes: What is kept from forward to backward, the largest of them.
    """

    seconds: float
    activation_bytes: int


def profile_json(stages: Mapping[str, Mapping[str, LayerUse]], facts: Mapping[str, Any]) -> str:
    """What ``parallel.pipeline_profile`` reads.

    Args:
        stages: What each layer takes, by stage of the plan and layer.
        facts: Machine and versions; only kept.
    """
    layers = {stage: {name: asdict(use) for name, use in uses.items()} for stage, uses in stages.items()}
    return json.dumps({**facts, "stages": layers}, indent=1)


def read_profile(path: Path, stage: str, layers: Sequence[str]) -> dict[str, LayerUse]:
    """Reads one stage of what ``profile_json`` wrote.

    Args:
        path: The file.
        stage: Name of the plan's stage.
        layers: Names of the chain's layers.

    Raises:
        UserError: There is no such file or stage in it, or it is of another chain.
    """
    remedy = "measure again with `omnivl profile PLAN --out FILE`"
    try:
        written = json.loads(path.read_bytes())["stages"][stage]
        uses = {name: LayerUse(**use) for name, use in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"parallel.pipeline_profile: got {path}, which is no profile of stage {stage!r} ({error!r}); {remedy}"
        ) from error
    if list(uses) != list(layers):
        strange = sorted(set(uses) ^ set(layers)) or ["the same in another order"]
        raise UserError(
            f"parallel.pipeline_profile: {path} is of another chain: it differs in {', '.join(strange[:5])}; {remedy}"
        )
    return uses
