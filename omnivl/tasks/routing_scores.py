"""The ``routing`` task: how a model's routers choose, as scores, and the page and the table that show it."""

from functools import partial
from pathlib import Path

import torch

from moe.analysis import usage
from moe.config import SparseConfig
from omnivl.tasks.config import RoutingTask
from omnivl.tasks.encoder import Encoder
from omnivl.tasks.pictures import PictureSet
from omnivl.tasks.results import ResultFile, Score, TaskResult
from omnivl.tasks.routing import routed_tokens
from omnivl.tasks.routing_page import routing_page, write_table

PAGE, TABLE = "routing.html", "routing.parquet"

_FIGURES = {
    "experts used, {}": "experts_used",
    "entropy, {}, nats": "local_entropy",
    "dropped, {}": "dropped",
}


def evaluate_routing(task: RoutingTask, encoder: Encoder) -> TaskResult:
    """Runs the task. Called by every replica in the same order.

    Every replica sends all samples through in the same batches: what a capacity drops depends on the batch, and layers
    of a sharded model must be called in step. Scores are means over the layers in which a modality has tokens.

    Raises:
        UserError: The model has no router.
    """
    pictures = PictureSet(task.source, task.media, task.where, encoder.model.inputs, task.max_samples)
    tokens = routed_tokens(encoder, pictures)
    ffn = encoder.model.ffn
    assert isinstance(ffn, SparseConfig), "tokens were routed, though the filling has no router"
    num_experts: int = ffn.num_experts
    figures = dict(_FIGURES)
    if not ffn.router.tokens_choose:
        del figures["dropped, {}"]  # a token that no expert took has no row in the table
    used = usage(tokens, num_experts)
    means = used.groupby("modality", observed=True)[list(figures.values())].mean()
    values = torch.tensor(means.to_numpy(), device=encoder.device)
    values = encoder.gather.total(values) / encoder.gather.replicas  # to the last bit equal on all of them
    scores = tuple(
        Score(task.name, metric.format(name), value, None, None, len(pictures), graded=False)
        for name, row in zip(means.index, values.tolist(), strict=True)
        for metric, value in zip(figures, row, strict=True)
    )

    def write_page(path: Path) -> None:
        page = routing_page(tokens, num_experts, pictures, encoder.model.patch_size, task.name)
        path.write_text(page, encoding="utf-8")

    return TaskResult(scores, files=(ResultFile(PAGE, write_page), ResultFile(TABLE, partial(write_table, tokens))))
