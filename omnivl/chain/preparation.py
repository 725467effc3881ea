"""Draws the objectives' inputs for a batch, where the batch is made: in a data worker or a background thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnivl.chain.objective import LARGE_BATCH, Objective, PrepareContext
from omnivl.chain.regions import draw_regions
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.fields import Field
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader


def asked_fields(objectives: Sequence[Objective], kind: DataKind, entry: str) -> dict[str, Field]:
    """Types of the fields that the objectives read from the samples of a data entry, which is given by its key.

    A text that several of them read has as many values and token positions as any of them wants.
    """
    asked: dict[str, Field] = {}
    for objective in objectives:
        if objective.acts_on(entry) and objective.demands(kind, LARGE_BATCH) is not None:
            for name, own in objective.sample_fields.items():
                other = asked.get(name, own)
                most, length = max(own.most, other.most), max(own.length, other.length)
                asked[name] = replace(own, most=most, length=length, required=own.required or other.required)
    return asked


def join_draws(*draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of them in one; an error where two have one name, since the later would silently replace the earlier."""
    joined: dict[str, Tensor] = {}
    for draw in draws:
        double = sorted(joined.keys() & draw.keys())
        if double:
            raise ValueError(f"{double[0]} is drawn twice: each draw of an objective needs a name of its own")
        joined |= draw
    return joined


@dataclass(frozen=True)
class Preparation:
    """Draws the inputs of all objectives that act on a batch. Picklable, so that data workers can have it.

    Attributes:
        objectives: The stage's objectives.
        tokens: Special tokens.
        sizes: Sizes of pictures and patches.
        seed: The stage's seed.
        readers: See ``PrepareContext.readers``.
    """

    objectives: tuple[Objective, ...]
    tokens: SpecialTokens
    sizes: InputSizes
    seed: int
    readers: Mapping[str, TextReader] = field(default_factory=dict)

    def __call__(self, batch: Batch, entry: str, step: int) -> dict[str, Tensor]:
        """The objectives' draws, by ``objective/name``, and the weights of their losses, by ``weight/objective``.

        Args:
            batch: A batch without ``prepared``.
            entry: Key of its data entry, part of the random keys.
            step: Optimizer step, for weight schedules.
        """
        context = PrepareContext(
            seed=self.seed,
            source=entry,
            tokens=self.tokens,
            grid=self.sizes.grid(is_video(batch.kind)),
            step=step,
            tubelet_size=self.sizes.tubelet_size if is_video(batch.kind) else 1,
            readers=self.readers,
        )
        draws: list[Mapping[str, Tensor]] = []
        acting = [objective for objective in self.objectives if objective.acts_on(entry)]
        asked = [objective.demands(batch.kind, batch.size) for objective in acting]
        regions = max((demands.regions for demands in asked if demands is not None), default=0)
        if regions:  # first: objectives draw from them
            drawn = draw_regions(batch, context, regions)
            draws.append(drawn)
            batch = replace(batch, prepared=drawn)
        for objective, demands in zip(acting, asked, strict=True):
            if demands is not None:
                weight = torch.tensor(objective.weight_at(step), dtype=torch.float32)
                draws += [objective.prepare(batch, context), {f"weight/{objective.key}": weight}]
        return join_draws(*draws)
