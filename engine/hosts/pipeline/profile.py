"""The file by which a pipeline may be cut: time and memory of each pass of a chain, measured by ``omnivl profile``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omnivl.chain.chain import pass_label
from omnivl.data.plain_files import read_small
from omnivl.errors import UserError

_MOST_BYTES = 16 << 20
_LARGEST = 1e15


@dataclass(frozen=True)
class LayerUse:
    """Cost of one pass of a layer for one micro-batch.

    Attributes:
        seconds: Forward and backward, the mean over the stage's kinds of batches.
        activation_bytes: Bytes kept from forward to backward, the largest over the kinds of batches.
    """

    seconds: float
    activation_bytes: int


def profile_json(stages: Mapping[str, Mapping[tuple[str, int], LayerUse]], facts: Mapping[str, Any]) -> str:
    """The content of the file that ``parallel.pipeline_profile`` names.

    Args:
        stages: Cost of each of ``Chain.passes``, by stage of the plan and pass.
        facts: Machine and versions, for information.
    """
    layers = {stage: {pass_label(*one): asdict(use) for one, use in uses.items()} for stage, uses in stages.items()}
    return json.dumps({**facts, "stages": layers}, indent=1)


def read_profile(path: Path, stage: str, passes: Sequence[tuple[str, int]]) -> dict[tuple[str, int], LayerUse]:
    """Reads one stage of what ``profile_json`` wrote.

    Args:
        path: The file.
        stage: Name of the plan's stage.
        passes: ``Chain.passes``.

    Raises:
        UserError: There is no such file or stage in it, or it is of another chain.
    """
    remedy = "measure again with `omnivl profile PLAN --out FILE`"
    try:
        written = json.loads(read_small(path, _MOST_BYTES))["stages"][stage]
        uses = {name: _use(**use) for name, use in written.items()}
        if uses and not sum(use.seconds for use in uses.values()) > 0:
            raise ValueError("layers that take no time")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"parallel.pipeline_profile: got {path}, which is no profile of stage {stage!r} ({error!r}); {remedy}"
        ) from error
    labels = [pass_label(*one) for one in passes]
    if list(uses) != labels:
        strange = sorted(set(uses) ^ set(labels)) or ["the same in another order"]
        raise UserError(
            f"parallel.pipeline_profile: {path} is of another chain: it differs in {', '.join(strange[:5])}; {remedy}"
        )
    return dict(zip(passes, uses.values(), strict=True))


def _use(seconds: float, activation_bytes: int) -> LayerUse:
    """One entry of the file.

    Raises:
        ValueError: A number is negative or none that a machine could have measured.
        TypeError: It is no number.
    """
    if not (0 <= seconds <= _LARGEST and 0 <= activation_bytes <= _LARGEST):
        raise ValueError(f"seconds {seconds}, activation_bytes {activation_bytes}")
    return LayerUse(float(seconds), int(activation_bytes))
