"""Accumulated micro-batches, on every host, have the gradient of the joined batch where losses are means over terms.

The reference is one plain process with a single micro-batch of all samples of the step. Texts differ in length and
masks in size, so that micro-batches and replicas hold different numbers of terms. Losses that compare embeddings are
those of the whole step (``batch.contrast: global``). Matching is left out: there the division is part of the loss.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import real_chain as real
import torch
from test_layouts import CONFIG, assert_equal_runs

from engine.hosts.base import Host
from engine.hosts.pipeline.cut import cut, layer_costs
from engine.hosts.pipeline.division import divide_chain
from engine.hosts.pipeline.host import PipelineHost
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.plain import PlainHost
from engine.hosts.zero.host import ZeroHost
from engine.processes.collectives import make_gather
from engine.step.freeze import freeze_idle
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.collate import Collator
from omnivl.objectives import ITC, LM, MCM, MFM, MLM, MRM, Objective, UniVLC

CONTRAST: tuple[Objective, ...] = (
    UniVLC(queue_size=32, batch_keys="momentum", soft_target_alpha=0.4),
    UniVLC(name="online", weight=0.5),
    ITC(name="pairs", loss_type="sigmoid", initial_bias=-1.0),
    ITC(name="soft", loss_type="soft", weight=0.5),
)
OBJECTIVES: tuple[Objective, ...] = (
    *(MLM(probability=0.5), MRM(), MFM(), MCM(targets="momentum"), LM(weight=0.5)),
    *CONTRAST,
)
LAYOUT = partial(plan_layout, OBJECTIVES)
KINDS: tuple[DataKind, ...] = ("image_text", "video_text", "image_text")
SAMPLES = 16
LIMITS = {"loss": 1e-5, "part": 1e-5, "drawn": 1e-5, "norm": 2e-5, "weight": 2e-5, "queue": 2e-5}
HOSTS = {
    1: ["plain-2", "plain-8"],
    2: ["plain-4", "zero1-4", "zero3-2", "zero3-8", "pipe2-4", "pipe2-8"],
    4: ["zero2-4", "pipe2-4"],
}
"""By the number of processes: hosts, each with its number of micro-batches."""

pytestmark = pytest.mark.distributed


def batches(step: int, accumulation: int, gather: Gather) -> list[Batch]:
    """A replica's micro-batches: the step's samples one after the other, each micro-batch shared out over replicas."""
    kind = KINDS[step]
    prepare = Preparation(OBJECTIVES, real.TOKENS, real.CONFIG.inputs, seed=0)
    collator = Collator(real.CONFIG.inputs, real.LetterTokenizer(), prepare)
    # Sorted by length: the texts of a micro-batch are alike, those of different ones are not.
    samples = sorted(real.examples(step, SAMPLES, is_video(kind)), key=lambda one: len(one.text or ""))
    joined, own = SAMPLES // accumulation, SAMPLES // accumulation // gather.replicas
    starts = [number * joined + gather.replica * own for number in range(accumulation)]
    return [collator.collate(samples[start : start + own], kind, "letters", step) for start in starts]


def make_host(name: str, accumulation: int) -> Host:
    word, number = name.rstrip("0123456789"), int(name[-1]) if name[-1].isdigit() else 0
    stages = number if word == "pipe" else 1
    gather = make_gather(place_in_pipeline(stages).data_group if stages > 1 else None)
    torch.manual_seed(0)
    chain = build_chain(real.CONFIG, OBJECTIVES, real.TOKENS, gather=gather)
    layouts = [LAYOUT(kind, SAMPLES, 4 if is_video(kind) else 1, "") for kind in KINDS[:2]]
    freeze_idle(chain, layouts)
    steps: dict[str, Any] = {"total_steps": len(KINDS), "gradient_accumulation_steps": accumulation}
    steps["contrasts_step"] = accumulation > 1
    if word == "plain":
        return PlainHost(chain, CONFIG, LAYOUT, **steps)
    steps["micro_batch_size"] = SAMPLES // accumulation // gather.replicas
    if word == "zero":
        return ZeroHost(chain, CONFIG, LAYOUT, zero_stage=number, **steps)  # type: ignore[arg-type]
    division = divide_chain(chain, cut(list(layer_costs(chain, layouts).values()), stages), layouts)
    return PipelineHost(chain, CONFIG, LAYOUT, division=division, zero_stage=1, **steps)


def train(hosts: list[str]) -> dict[str, dict[str, Any]]:
    """Worker: trains each host, named with its number of micro-batches, from the same weights."""
    report = {}
    for entry in hosts:
        name, _, accumulation = entry.rpartition("-")
        host = make_host(name, int(accumulation))
        results = [host.step(batches(step, int(accumulation), host.gather), step) for step in range(len(KINDS))]
        report[entry] = {"results": results, "weights": host.full_weights()}
    return report


@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", HOSTS)
def test_any_division_has_the_gradient_of_the_joined_batch(run_distributed: Any, processes: int) -> None:
    expected = train(["plain-1"])["plain-1"]
    got = train(HOSTS[1]) if processes == 1 else None
    if got is None:
        got, *_ = run_distributed(train, processes=processes, limit=200, hosts=HOSTS[processes])
    for name in HOSTS[processes]:
        assert_equal_runs(comparable(got[name]), comparable(expected), LIMITS)
        for mine, theirs in zip(got[name]["results"], expected["results"], strict=True):
            compared = {key for key in theirs.metrics if key.split("/")[0] in {one.key for one in CONTRAST}}
            assert compared
            for key in compared:
                assert mine.metrics[key] == pytest.approx(theirs.metrics[key], rel=1e-4), key


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """Without accuracies, which are means over micro-batches and replicas, and with the queue's keys in one order."""
    weights = dict(run["weights"])
    (place,) = {name.rpartition(".")[0] for name in weights if ".queue." in name}
    order = torch.from_numpy(np.lexsort((weights[f"{place}.visual"][:, 0], weights[f"{place}.identity"])))
    for name in [name for name in weights if name.startswith(place) and len(weights[name].shape) > 0]:
        weights[name] = weights[name][order] if len(weights[name]) == len(order) else weights[name]
    return {"results": [replace(result, metrics={}) for result in run["results"]], "weights": weights}
