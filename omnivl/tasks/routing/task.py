"""The ``routing`` task: scores, page and table of the routers' choices."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, Reads
from omnivl.tasks.needs import Lack, Need, Provided
from omnivl.tasks.results import ResultFile, Score, TaskResult
from omnivl.tasks.task import Samples, Task

PAGE, TABLE = "routing.html", "routing.parquet"

_FIGURES = {
    "experts used, {}": "experts_used",
    "entropy, {}, nats": "local_entropy",
    "dropped, {}": "dropped",
}


class Routers(Need):
    """Layers that encode pictures or texts and route tokens."""

    def lack(self, stage: Provided) -> Lack | None:
        """See ``Need``."""
        if stage.model.has_routers:
            return None
        what = f"has no routers in its {stage.model.kinds_of_filling} feed-forward layers"
        return Lack(what, "use model.ffn of kind 'limoe' or 'mome_limoe'")


@dataclass(frozen=True)
class RoutingTask(Task):
    """Choices of the routers of sparse experts: experts used, entropy and drops by modality, and a page.

    Each picture or clip is encoded, and so is its first caption if it has one. The page and a table of all routed
    tokens are written beside the results. Needs ``model.ffn`` of kind ``limoe`` or ``mome_limoe``.

    Attributes:
        both_media: Both pictures and clips of the source, on one page and in one table.
    """

    reads: ClassVar[Reads] = "media"
    lower_is_better: ClassVar[tuple[str, ...]] = ("dropped, *",)

    kind: Literal["routing"] = "routing"
    max_samples: Annotated[int, Range(1)] = 512
    both_media: bool = False

    def lacks(self, stage: Provided) -> list[Lack]:
        """See ``Task``."""
        found = super().lacks(stage)
        return found or replace(self, media="video", both_media=False).lacks(stage) if self.both_media else found

    @property
    def samples(self) -> tuple[Samples, ...]:
        """See ``Task``: pictures, clips or both."""
        (own,) = super().samples
        other: Media = "image" if self.media == "video" else "video"
        return (own, replace(own, media=other)) if self.both_media else (own,)

    @property
    def needs(self) -> tuple[Need, ...]:
        """Routers."""
        return (Routers(),)

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        return tuple(metric.format("*") for metric in _FIGURES)

    def run(self, encoder: Encoder) -> TaskResult:
        """Scores are means over the layers in which a modality has tokens.

        Every replica encodes all samples in the same batches: the tokens that a capacity drops depend on the batch, and
        layers of a sharded model must be called in step.
        """
        from moe.analysis import usage
        from omnivl.tasks.routing.forced import forced_by
        from omnivl.tasks.routing.page import routing_page, write_table
        from omnivl.tasks.routing.tokens import experts_by_layer, joined, routed_tokens

        others = [replace(self, media="image" if self.media == "video" else "video")] if self.both_media else []
        sets = [one.picture_set(encoder) for one in (self, *others)]
        tables = [routed_tokens(encoder, pictures) for pictures in sets]
        tokens = tables[0] if len(tables) == 1 else joined(tables)
        num_experts = experts_by_layer(encoder.model, tokens)
        figures = dict(_FIGURES)
        if not any(ffn.router.tokens_choose for ffn in encoder.model.sparse.values()):
            del figures["dropped, {}"]  # tokens that no expert took have no row
        used = usage(tokens, num_experts)
        means = used.groupby("modality", observed=True)[list(figures.values())].mean()
        values = torch.tensor(means.to_numpy(), device=encoder.device)
        values = encoder.gather.total(values) / encoder.gather.replicas  # equal to the last bit on all of them
        scores = tuple(
            Score(self.name, metric.format(name), value, None, None, sum(map(len, sets)), graded=False)
            for name, row in zip(means.index, values.tolist(), strict=True)
            for metric, value in zip(figures, row, strict=True)
        )

        def write_page(path: Path) -> None:
            forced = forced_by(encoder.model, tokens)
            page = routing_page(tokens, num_experts, sets, encoder.model.inputs.patch_size, self.name, forced)
            path.write_text(page, encoding="utf-8")

        return TaskResult(scores, files=(ResultFile(PAGE, write_page), ResultFile(TABLE, partial(write_table, tokens))))
