"""Every parallel layout: losses, gradient norms and weights agree with those of one plain process.

The reference is one plain process that holds the joined batch. Kinds of data change between and within steps, so that
layers and parts of layers go without gradient in some steps; gradients are accumulated and clipped; momentum twins and
the queue are among the weights.

A model is named by its parts: ``real-limoe-spatial-bf16`` is the real chain with experts, trained on images, in bf16;
``plan-beit3_tiny-masked`` is that of a plan's stage, narrower.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import real_chain as real
import synthetic_chain as synthetic
import torch
from plan_chain import UNIFIED, plan_stage

from engine.hosts import layer_sharder
from engine.hosts.base import Host
from engine.hosts.pipeline.cut import cut, layer_costs
from engine.hosts.pipeline.division import divide_chain
from engine.hosts.pipeline.host import PipelineHost
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.plain import PlainHost
from engine.hosts.zero.host import ZeroHost
from engine.plan.parallel import ParallelConfig
from engine.processes.collectives import make_gather
from engine.step.freeze import freeze_idle
from engine.step.muon import MuonConfig
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures.build import Settle
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.data.batch import DATA_KINDS, DataKind, is_video

PAIRED = DATA_KINDS[:4]  # something to see, with a text

STEPS, ACCUMULATION, JOINED = 6, 2, 8
ZERO = ["zero0", "zero1", "zero2", "zero3"]
KINDS: dict[str, Sequence[DataKind]] = {
    "spatial": ("image_text", "image_label"),
    "temporal": ("video_text", "video_label"),
    "joint": PAIRED,
}
LAYOUTS = {
    2: ["plain", *ZERO, "pipe2-zero0", "pipe2-zero1"],
    4: [*ZERO, "pipe2-zero0", "pipe2-zero1", "pipe4-zero1"],
}
CUT_EXPERTS = {
    2: ["zero0-ep2", "zero1-ep2", "zero2-ep2", "zero3-ep2"],
    4: [
        *("zero0-ep2", "zero1-ep2", "zero2-ep2", "zero3-ep2", "zero1-ep4", "zero2-ep4", "zero3-ep4-built"),
        *("pipe2-zero0-ep2", "pipe2-zero1-ep2"),
    ],
}
CONFIG = OptimizerConfig(
    # eps is large enough that a gradient of pure rounding noise is not blown up to a full step.
    **{"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "gradient_clipping": 0.5},
    **{"schedule": "linear", "warmup_steps": 2, "layer_decay": 0.7, "new_head_lr_scale": 2.0},
)
MUON = replace(CONFIG, kind="muon", muon=MuonConfig(lr=3e-3, weight_decay=0.1))
TOLERANCES: dict[str, dict[str, float]] = {
    "synthetic": {"loss": 1e-5, "part": 1e-5, "drawn": 1e-5, "norm": 1e-5, "weight": 1e-6, "queue": 1e-6},
    # Small differences of large numbers in its gradients: at equal weights the norms of one and four processes agree to
    # 5e-6, the losses to 1e-7. A gather that lost a share of the gradient would be off by tenths.
    "real": {"loss": 1e-5, "part": 1e-5, "drawn": 1e-5, "norm": 1e-4, "weight": 5e-5, "queue": 5e-5},
    # Eight bits of mantissa: a sum in another order is off by 2^-9 of its largest part. Weights move by at most the
    # learning rate in each step; the queue has directions as they came out. Single losses are of few samples, and the
    # negatives of matching are drawn by their similarity: rounding may draw another one.
    "bf16": {"loss": 1e-2, "part": 3e-2, "drawn": 0.1, "norm": 0.1, "weight": 5e-3, "queue": 5e-2},
}

pytestmark = pytest.mark.distributed


class Model:
    """What the parts of a model's name ask for."""

    optimizer: OptimizerConfig = CONFIG

    def __init__(self, name: str) -> None:
        self.parts = name.split("-")
        self.real = self.parts[0] == "real"
        self.planned = plan_stage(name.removeprefix("plan-")) if self.parts[0] == "plan" else None
        self.unified = "unified" in self.parts
        self.kinds = next((KINDS[part] for part in self.parts if part in KINDS), PAIRED)
        kind = "synthetic" if self.parts[0] == "synthetic" else "real"
        self.tolerances = TOLERANCES["bf16" if "bf16" in self.parts else kind]
        if "muon" in self.parts:
            self.optimizer = MUON
        self.objectives = real.UNIFIED_OBJECTIVES if self.unified else real.OBJECTIVES
        self.plan_layout = synthetic.plan_layout
        if self.real:
            self.plan_layout = real.plan_unified_layout if self.unified else real.plan_layout
        if self.planned is not None:
            self.plan_layout = self.planned.plan_layout

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        if self.planned is not None:
            return self.planned.build(gather, settle, seed)
        if not self.real:
            return synthetic.build_synthetic_chain(gather)
        chain = real.build_real_chain(
            gather,
            seed=seed,
            recompute="block" if "recompute" in self.parts else "none",
            ffn=next((part for part in self.parts if part in real.FILLINGS), "dense"),
            unified=self.unified,
            compute_dtype=torch.bfloat16 if "bf16" in self.parts else torch.float32,
            settle=settle,
        )
        freeze_idle(chain, self.layouts())
        return chain

    def layouts(self) -> list[Any]:
        if self.planned is not None:
            return self.planned.layouts
        return [self.plan_layout(kind, JOINED, 4 if is_video(kind) else 1) for kind in self.kinds]

    def costs(self, chain: Chain) -> dict[Any, float]:
        synthetic = not self.real and self.planned is None
        return dict.fromkeys(chain.passes, 1.0) if synthetic else layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Any]:
        if self.planned is not None:
            return self.planned.step_batches(step, ACCUMULATION, JOINED, gather)
        if not self.real:
            return synthetic.step_batches(step, ACCUMULATION, JOINED, gather)
        return real.step_batches(step, ACCUMULATION, JOINED, gather, self.objectives, self.kinds)


def make_host(name: str, model: Model, seed: int = 0) -> Host:
    """``plain``, ``zeroS`` or ``pipeN-zeroS``, with words behind it.

    ``epP`` cuts experts over P processes, ``built`` cuts each layer as soon as it is made, ``offload`` and
    ``offload_all`` keep optimizer states and parameters in the host's memory, ``files`` in mapped files; with ``low``
    gradients are sent in bf16.
    """
    parts = dict(_split(part) for part in name.split("-"))
    stages = parts.get("pipe", 1)
    layout = ParallelConfig(
        host="zero",
        zero_stage=parts.get("zero", 0),  # type: ignore[arg-type]
        offload="parameters" if "offload_all" in parts else "optimizer" if "offload" in parts else "none",
        offload_device="nvme" if "files" in parts else "cpu",
        nvme_folder="states",  # of the folder in which the process runs
        expert_parallel_size=parts.get("ep", 1),
    )
    gather = make_gather(place_in_pipeline(stages).data_group if stages > 1 else None)
    chain = model.build(gather, _settler(layout) if "built" in parts else None, seed)
    common: dict[str, Any] = {
        "total_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATION,
        "communication_dtype": "bf16" if "low" in parts else "fp32",
    }
    if "plain" in parts:
        return PlainHost(chain, model.optimizer, model.plan_layout, **common)
    sizes: dict[str, Any] = {
        **common,
        "micro_batch_size": JOINED // (torch.distributed.get_world_size() // stages),
        "expert_parallel_size": parts.get("ep", 1),
    }
    if stages == 1:
        sizes |= {"zero_stage": parts["zero"], "offload": layout.offloading}
        return ZeroHost(chain, model.optimizer, model.plan_layout, **sizes)
    cuts = cut(list(model.costs(chain).values()), stages)
    division = divide_chain(chain, cuts, model.layouts())
    return PipelineHost(chain, model.optimizer, model.plan_layout, division=division, zero_stage=parts["zero"], **sizes)


def _settler(layout: ParallelConfig) -> Settle:
    cut_layer = layer_sharder(layout, torch.device("cpu"))
    assert cut_layer is not None
    return lambda _, layer: cut_layer(layer)


def _split(part: str) -> tuple[str, int]:
    word = part.rstrip("0123456789")
    return word, int(part[len(word) :] or 0)


def train_hosts(hosts: list[str], model_name: str) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from the same weights."""
    return train(Model(model_name), hosts)


def train(model: Model, hosts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Trains each host in turn from the same weights."""
    report = {}
    for name in hosts:
        host = make_host(name, model)
        results = [host.step(model.batches(step, host.gather), step) for step in range(STEPS)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@cache
def reference(model_name: str) -> dict[str, Any]:
    return train_hosts(["plain"], model_name)["plain"]


def assert_equal_runs(got: dict[str, Any], expected: dict[str, Any], tolerances: dict[str, float]) -> None:
    relative = partial(
        pytest.approx, rel=tolerances["loss"], nan_ok=True
    )  # routers that see no text have no mean of it
    exact = tolerances["loss"] <= 1e-5
    for step, (ours, theirs) in enumerate(zip(got["results"], expected["results"], strict=True)):
        assert ours.loss == relative(theirs.loss), f"loss of step {step}"
        assert ours.losses.keys() == theirs.losses.keys(), f"losses of step {step}"
        for name, value in ours.losses.items():
            bound = tolerances["drawn" if name == "vlm" else "part"]
            assert value == pytest.approx(theirs.losses[name], rel=bound, abs=0.1 * bound), f"{name} of step {step}"
        assert ours.metrics.keys() == theirs.metrics.keys(), f"metrics of step {step}"
        for name, value in ours.metrics.items():
            # Accuracies over a data-dependent number of words or names are averaged per replica, losses exactly, as is
            # the share of patches of pictures of their own sizes. Accuracies of bf16 jump where two candidates are as
            # good.
            # How many codes occur is counted for each replica and micro-batch.
            if name.endswith(("/perplexity", "/used")):
                continue
            if exact and not name.startswith(
                ("mlm/", "lm/", "split_lm/", "captions/", "classify/accuracy", "mrm/masked", "mfm/masked")
            ):
                assert value == relative(theirs.metrics[name]), f"{name} of step {step}"
        norm = pytest.approx(theirs.gradient_norm, rel=tolerances["norm"])
        assert ours.gradient_norm == norm, f"gradient norm of step {step}"
        assert ours.learning_rates == theirs.learning_rates
        assert not ours.skipped
    assert got["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(
            got["weights"][name],
            tensor,
            **{"rtol": 1e-5, "atol": tolerances["queue" if ".queue" in name else "weight"]},
            msg=lambda text, name=name: f"{name}: {text}",
        )


def differences(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart at most: losses and norms relatively, weights and queue absolutely."""
    steps = list(zip(got["results"], expected["results"], strict=True))
    apart = {
        name: (got["weights"][name].double() - tensor.double()).abs().max().item()
        for name, tensor in expected["weights"].items()
    }
    return {
        "loss": max(abs(ours.loss / theirs.loss - 1) for ours, theirs in steps),
        "norm": max(abs(ours.gradient_norm / theirs.gradient_norm - 1) for ours, theirs in steps),
        "weight": max(value for name, value in apart.items() if ".queue" not in name),
        "queue": max((value for name, value in apart.items() if ".queue" in name), default=0.0),
    }


def matrix() -> Iterator[Any]:
    """Every layout of every kind of stage and filling. What runs every time: all layouts of the joint stage with
    experts, and those of two processes with dense layers."""
    for kind in KINDS:
        for ffn in ("dense", "mome", "limoe"):
            for processes, hosts in LAYOUTS.items():
                fast = kind == "joint" and (ffn == "limoe" or (ffn == "dense" and processes == 2))
                yield _case(f"real-{ffn}-{kind}", processes, hosts, fast)
        for processes, hosts in CUT_EXPERTS.items():
            yield _case(f"real-limoe-{kind}", processes, hosts, kind == "joint")
    for ffn in ("dense", "mome", "limoe"):
        for processes in LAYOUTS:
            hosts = [*LAYOUTS[processes], *(CUT_EXPERTS[processes] if ffn == "limoe" else ())]
            yield _case(f"real-{ffn}-joint-bf16", processes, hosts, ffn == "dense" and processes == 2)


def twice_passed() -> Iterator[Any]:
    """Layers that stand on two stages: of every plan of one transformer, and with all objectives at once."""
    pipelines = {2: ["pipe2-zero0", "pipe2-zero1"], 4: ["pipe4-zero0", "pipe4-zero1", "pipe2-zero0", "pipe2-zero1"]}
    for stage in UNIFIED:
        for processes, hosts in pipelines.items():
            cut_experts = CUT_EXPERTS[4][-2:] if stage.startswith("limoe") and processes == 4 else []
            fast = stage == "beit3_tiny-masked" or (stage == "vlmo_tiny-turns" and processes == 2)
            yield _case(f"plan-{stage}", processes, [*hosts, *cut_experts], fast)
    yield _case("real-unified", 2, pipelines[2], False)
    yield _case("real-unified-mome-recompute", 2, ["pipe2-zero1"], False)
    yield _case("real-unified-balanced", 2, pipelines[2], False)
    yield _case("real-unified-balanced", 4, [*pipelines[4], *CUT_EXPERTS[4][-2:]], True)
    yield _case("real-unified-limoe-bf16", 4, pipelines[4], False)


def names() -> Iterator[Any]:
    """Every layout of a model that tells pictures and clips from names, beside contrast with twins and a queue."""
    for processes, hosts in LAYOUTS.items():
        yield _case("plan-quickstart-names", processes, hosts, processes == 2)
        yield _case("plan-quickstart-names", processes, CUT_EXPERTS[processes], False)


def own_sizes() -> Iterator[Any]:
    """Every layout with pictures and clips of their own sizes, of stacks apart and of one transformer."""
    for processes, hosts in LAYOUTS.items():
        for model in ("plan-quickstart-own", "plan-vlmo_tiny-own"):
            yield _case(model, processes, hosts, processes == 2)
        yield _case("plan-quickstart-own", processes, CUT_EXPERTS[processes], False)


def relatives() -> Iterator[Any]:
    """Every layout of related systems, with pictures, clips and labels in turn."""
    for processes, hosts in LAYOUTS.items():
        for model in (
            "plan-coca_tiny-pairs",
            "plan-git_tiny-captions",
            "plan-simvlm_tiny-pairs",
            "plan-pali_tiny-mixture",
        ):
            yield _case(model, processes, hosts, processes == 2)


def _case(model: str, processes: int, hosts: list[str], fast: bool) -> Any:
    return pytest.param(model, processes, hosts, marks=() if fast else pytest.mark.full)


@pytest.mark.parametrize(
    ("model_name", "processes", "hosts"),
    [
        ("synthetic", 1, ZERO),
        ("synthetic", 2, LAYOUTS[2]),
        ("synthetic", 2, ["zero1-offload", "zero2-offload", "zero3-offload"]),
        ("synthetic", 4, ["pipe2-zero1", "zero1", "pipe4-zero0", "zero3"]),  # one after the other in the same processes
        ("real", 2, ["zero3-built", "zero3-built-offload_all", "zero3-offload_all-files", "zero2-offload-files"]),
        *matrix(),
        ("synthetic-muon", 2, [*LAYOUTS[2], "zero2-offload"]),
        (
            *("real-limoe-joint-muon", 2),
            ["plain", "zero1", "zero3-built", "zero3-offload_all-files", "zero0-ep2", *CUT_EXPERTS[2][-2:]],
        ),
        _case(
            *("real-limoe-joint-muon", 4),
            ["zero0-ep2", "zero2", "zero3", "pipe2-zero1", "pipe4-zero0", *CUT_EXPERTS[4][-2:]],
            False,
        ),
        ("real-recompute", 2, ["zero3"]),
        ("real-attribute", 2, ["plain", "zero3"]),
        ("real-mome_limoe", 2, ["plain", "zero2", "zero3", "zero3-ep2"]),
        ("real-mome-recompute", 2, ["pipe2-zero1"]),
        ("real-unified", 2, ["plain", "zero1", "zero3"]),
        ("real-unified-mome", 2, ["zero3"]),
        *twice_passed(),
        *names(),
        *own_sizes(),
        *relatives(),
        ("real-unified-limoe-recompute", 2, ["plain", "zero3", "zero1-ep2", "zero3-ep2"]),
    ],
)
def test_hosts_agree(
    run_distributed: Any, record_property: Any, model_name: str, processes: int, hosts: list[str]
) -> None:
    expected, tolerances = reference(model_name), Model(model_name).tolerances
    ranks = run_distributed(train_hosts, processes=processes, limit=200, hosts=hosts, model_name=model_name)
    for name in hosts:
        measured = {"model": model_name, "processes": processes, "host": name, "steps": STEPS}
        record_property("layout", json.dumps({**measured, **differences(ranks[0][name], expected)}))
    for name in hosts:
        assert_equal_runs(ranks[0][name], expected, tolerances)
        for other in ranks[1:]:
            assert other[name]["weights"] is None  # only replica 0 holds whole weights
            assert repr(other[name]["results"]) == repr(ranks[0][name]["results"])  # as text, nan equals nan
