"""CLIP on several processes: its losses over replicas, and its chain on every kind of host."""

from functools import cache, partial
from typing import Any

import pytest
import test_layouts as layouts
import test_objectives as joined
import torch

from engine.hosts.pipeline.cut import layer_costs
from engine.processes.collectives import ProcessGroupGather
from engine.step.freeze import freeze_idle
from omnivl.architectures import CLIP
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch, DataKind
from omnivl.objectives import ITC, Objective, UniVLC
from omnivl.parts.sizes import MomentumConfig, Transformer

pytestmark = pytest.mark.distributed

CONFIG = CLIP(
    vision=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-5),
    text=Transformer(hidden_size=12, num_heads=3, layers=2, norm_eps=1e-5),
    **{"image_size": 8, "num_frames": 4, "patch_size": 4, "text_length": 9, "vocab_size": 40, "projection_size": 8},
    momentum=MomentumConfig(decay=0.5),
)
CASES: dict[str, tuple[Objective, ...]] = {
    **{loss_type: (ITC(loss_type=loss_type),) for loss_type in ("softmax", "soft", "sigmoid")},
    "soft by the temperature": (ITC(loss_type="soft", soft_target_factor="temperature", temperature=0.9),),
    "univlc": (UniVLC(queue_size=13),),
}
KINDS: list[DataKind] = ["image_text", "video_text", "video_label"]
HOSTS = ["plain", "zero1", "zero3", "pipe2-zero0", "pipe2-zero1"]


def make_chain(objectives: tuple[Objective, ...], gather: Gather, settle: Settle | None = None) -> Chain:
    torch.manual_seed(0)
    chain = build_chain(CONFIG, objectives, joined.TOKENS, gather=gather, settle=settle)
    with torch.no_grad():  # away from the start, where all embeddings are alike
        for name, parameter in chain.named_parameters():
            if parameter.requires_grad and "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return chain


def on_replica() -> dict[str, Any]:
    gather = ProcessGroupGather()
    share = joined.TOTAL // gather.replicas
    rows = slice(gather.replica * share, (gather.replica + 1) * share)
    return {
        case: joined.run_steps(make_chain(objectives, gather), objectives, KINDS, rows)
        for case, objectives in CASES.items()
    }


@pytest.mark.timeout(150)
def test_two_replicas_equal_the_joined_batch(run_distributed: Any) -> None:
    runs = run_distributed(on_replica, processes=2)
    for case, objectives in CASES.items():
        wanted = joined.run_steps(make_chain(objectives, LocalGather()), objectives, KINDS, slice(0, joined.TOTAL))
        assert all(abs(loss) > 1e-3 for step in wanted["losses"] for loss in step.values())
        for got in runs:
            joined.assert_equal_runs(got[case], wanted)


class Model:
    """What ``test_layouts`` asks of a model."""

    optimizer = layouts.CONFIG

    def __init__(self, case: str) -> None:
        self.objectives = CASES[case]
        self.plan_layout = partial(plan_layout, self.objectives)

    def layouts(self) -> list[Any]:
        return [self.plan_layout(kind, layouts.JOINED, 4 if kind.startswith("video") else 1) for kind in KINDS]

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        chain = make_chain(self.objectives, gather, settle)
        freeze_idle(chain, self.layouts())
        return chain

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Batch]:
        own = layouts.JOINED // gather.replicas
        rows = slice(gather.replica * own, (gather.replica + 1) * own)
        numbers = range(step * layouts.ACCUMULATION, (step + 1) * layouts.ACCUMULATION)
        return [joined.make_batch(KINDS[number % len(KINDS)], number, rows, self.objectives) for number in numbers]


def train(hosts: list[str], case: str) -> dict[str, Any]:
    """Worker: trains each host in turn from the same weights."""
    model, report = Model(case), {}
    for name in hosts:
        host = layouts.make_host(name, model)  # type: ignore[arg-type]
        results = [host.step(model.batches(step, host.gather), step) for step in range(layouts.STEPS)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@cache
def reference(case: str) -> dict[str, Any]:
    return train(["plain"], case)["plain"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["softmax", "sigmoid", "univlc"])
def test_hosts_agree(run_distributed: Any, case: str) -> None:
    ranks = run_distributed(train, processes=2, limit=250, hosts=HOSTS, case=case)
    for name in HOSTS:
        layouts.assert_equal_runs(ranks[0][name], reference(case), layouts.TOLERANCES["real"])
