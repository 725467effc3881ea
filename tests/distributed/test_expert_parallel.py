"""Experts that are split over processes: their checkpoints, and the layouts that can resume from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import real_chain as real
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from engine.errors import PlanError
from engine.hosts.base import Host
from engine.hosts.pipeline.cut import cut
from engine.hosts.pipeline.division import divide_chain
from engine.hosts.pipeline.host import PipelineHost
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.plain import PlainHost
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.zero.host import ZeroHost
from engine.processes.collectives import ProcessGroupExchange, make_gather
from engine.step.optimizer import OptimizerConfig
from moe.experts.bank import ExpertBank
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

STEPS, SAVED, JOINED = 5, 3, 8
CONFIG = OptimizerConfig(lr=3e-3, eps=1e-3, weight_decay=0.1, gradient_clipping=0.5, schedule="linear")

pytestmark = pytest.mark.distributed


def make_host(name: str, seed: int = 0, ffn: str = "limoe") -> Host:
    """``plain``, or ``zeroS`` with ``-epP`` behind it, and ``pipe-`` before it for two pipeline stages."""
    pipeline = name.startswith("pipe-")
    gather = make_gather(place_in_pipeline(2).data_group if pipeline else None)
    chain = real.build_real_chain(gather, seed=seed, ffn=ffn)
    if name == "plain":
        return PlainHost(chain, CONFIG, real.plan_layout, total_steps=STEPS)
    zero, _, size = name.removeprefix("pipe-").partition("-ep")
    stage: Any = int(zero[len("zero")])
    sizes: dict[str, Any] = {"total_steps": STEPS, "micro_batch_size": JOINED // gather.replicas}
    sizes["expert_parallel_size"] = int(size or 1)
    if pipeline:
        division = divide_chain(chain, cut([1.0] * len(chain.passes), 2))
        return PipelineHost(chain, CONFIG, real.plan_layout, division=division, zero_stage=stage, **sizes)
    return ZeroHost(chain, CONFIG, real.plan_layout, zero_stage=stage, **sizes)


def train(host: Host, steps: range) -> list[Any]:
    return [host.step(real.step_batches(step, 1, JOINED, host.gather), step) for step in steps]


def save_after_some_steps(folder: str, hosts: list[str]) -> dict[str, Any]:
    """Worker: trains, saves, and says what every process held of the first bank."""
    held = {}
    for name in hosts:
        host = make_host(name)
        train(host, range(SAVED))
        host.save(Path(folder) / name)
        bank = next(module for module in host.chain.modules() if isinstance(module, ExpertBank))
        held[name] = (bank.num_experts, bank.own, tuple(getattr(bank.fc1_bias, "ds_shape", bank.fc1_bias.shape)))
    return held


def load_and_go_on(folder: str, pairs: list[tuple[str, str]], out: str) -> dict[str, Any]:
    """Worker: loads what one host saved into another, saves that again, and trains on."""
    report = {}
    for saved, name in pairs:
        host = make_host(name, seed=1)
        host.load(Path(folder) / saved)
        host.save(Path(out) / f"{saved}+{name}")
        results = train(host, range(SAVED, STEPS))
        report[f"{saved}+{name}"] = {"results": results, "weights": host.full_weights()}
    return report


def read(folder: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(folder)
    return {key: saved.whole(key) for key in saved.shapes}


def test_saved_at_two_loaded_at_one_two_and_four(run_distributed: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    held = run_distributed(save_after_some_steps, processes=2, folder=folder, hosts=["zero1-ep2", "zero3-ep2"])
    assert [rank["zero1-ep2"] for rank in held] == [(4, slice(0, 2), (2, 64)), (4, slice(2, 4), (2, 64))]
    assert [rank["zero3-ep2"] for rank in held] == [(4, slice(0, 2), (2, 64)), (4, slice(2, 4), (2, 64))]

    plain = make_host("plain")
    train(plain, range(SAVED))
    plain.save(tmp_path / "plain")
    expected = read(tmp_path / "plain")
    uninterrupted = train(plain, range(SAVED, STEPS))
    weights = plain.full_weights()
    assert weights is not None

    for saved in ("zero1-ep2", "zero3-ep2"):
        written = read(tmp_path / "saved" / saved)
        assert written.keys() == expected.keys()
        experts = [name for name in written if ".ffn.experts." in name]
        assert {name.partition("/")[0] for name in experts} == {"weight", "exp_avg", "exp_avg_sq"}
        for name in experts:
            assert len(written[name]) == 4
            for expert, (ours, theirs) in enumerate(zip(written[name], expected[name], strict=True)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5, msg=f"{saved}: {name}, expert {expert}")
        assert all(written[f"exp_avg/{name}"].any() for name in _trained_banks(written))

    layouts = {
        1: [("zero1-ep2", "plain"), ("zero3-ep2", "zero3")],
        2: [("zero1-ep2", "zero3-ep2"), ("zero3-ep2", "zero2"), ("zero3-ep2", "zero3-ep2")],
        4: [
            *(("zero1-ep2", "zero3-ep4"), ("zero3-ep2", "zero1-ep4"), ("zero3-ep2", "zero0-ep2")),
            *(("zero1-ep2", "pipe-zero0-ep2"), ("zero3-ep2", "pipe-zero1-ep2")),
        ],
    }
    for processes, pairs in layouts.items():
        out = tmp_path / str(processes)
        reports = run_distributed(load_and_go_on, processes=processes, folder=folder, pairs=pairs, out=str(out))
        for saved, name in pairs:
            before, after = read(tmp_path / "saved" / saved), read(out / f"{saved}+{name}")
            assert before.keys() == after.keys()
            assert [key for key in before if not torch.equal(before[key], after[key])] == []
            report = reports[0][f"{saved}+{name}"]
            for step, (ours, theirs) in enumerate(zip(report["results"], uninterrupted, strict=True), start=SAVED):
                assert ours.loss == pytest.approx(theirs.loss, rel=1e-5), f"{saved} to {name}, step {step}"
                assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4), f"{saved} to {name}"
            for key, tensor in weights.items():
                torch.testing.assert_close(report["weights"][key], tensor, rtol=1e-4, atol=5e-5, msg=f"{name}: {key}")


def _trained_banks(written: dict[str, torch.Tensor]) -> list[str]:
    names = [name.removeprefix("weight/") for name in written if name.startswith("weight/") and "fc2_weight" in name]
    return [name for name in names if f"exp_avg/{name}" in written]


def hand_whole_weights_in(weights: str) -> dict[str, Any]:
    """Worker: whole weights from elsewhere go into banks that are cut, and come out again."""
    given = load_file(weights) if make_gather().replica == 0 else None
    report = {}
    for name in ("zero0-ep2", "zero2-ep2", "zero3-ep2"):
        host = make_host(name, seed=2)
        host.load_weights(given)
        taken = host.full_weights()
        report[name] = {"taken": taken, "result": train(host, range(1))[0]}
    return report


def test_whole_weights_go_into_banks_that_are_cut(run_distributed: Any, tmp_path: Path) -> None:
    plain = make_host("plain", seed=5)
    weights = plain.full_weights()
    assert weights is not None
    save_file(dict(weights), tmp_path / "weights.safetensors")
    expected = train(plain, range(1))[0]
    ranks = run_distributed(hand_whole_weights_in, processes=2, weights=str(tmp_path / "weights.safetensors"))
    for name, report in ranks[0].items():
        assert [key for key in weights if not torch.equal(report["taken"][key], weights[key])] == [], name
        assert report["result"].loss == pytest.approx(expected.loss, rel=1e-5), name


def refusals() -> list[str]:
    """Worker: what cannot be cut."""
    told = []
    for name, ffn in (("zero1-ep3", "limoe"), ("zero1-ep2", "dense")):
        try:
            make_host(name, ffn=ffn)
        except PlanError as error:
            told.append(str(error))
    return told


def test_what_cannot_be_cut_is_refused(run_distributed: Any) -> None:
    assert run_distributed(refusals, processes=2)[1] == [
        "parallel.expert_parallel_size: got 3 for 2 processes; allowed is a divisor of their number; change it or "
        "launch.processes",
        "parallel.expert_parallel_size: got 2 for a model without sparse experts; allowed is 1; change it, or "
        "model.ffn",
    ]


def note_the_order() -> dict[str, Any]:
    """Worker: what a layer with a shared expert did in both passes, in order, and what came out."""
    torch.manual_seed(0)
    whole = SparseFeedForward(real.FILLINGS["limoe"], 16, 32, ("text",))
    halved = deepcopy(whole)
    halved.experts.cut(ProcessGroupExchange(dist.group.WORLD))
    x = torch.randn(2, 6, 16)[[dist.get_rank()]].requires_grad_()
    out: dict[str, Any] = {}
    for name, layer in (("whole", whole), ("cut", halved)):
        events: list[str] = []
        with noted_exchanges(events), noted_runs(layer.shared, events):
            y = layer(x, Tokens((Segment("text", 6),))).y
            events.append("backward")
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        out[name] = {"events": events, "y": y.detach(), "gradient": gradient}
    return out


@contextmanager
def noted_exchanges(events: list[str]) -> Iterator[None]:
    """Notes when an exchange of rows begins and when it is waited for."""
    exchange = dist.all_to_all_single

    class Noted:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("awaited")
            self.work.wait()

    def noted(arrived: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        work = exchange(arrived, *arguments, **options)
        if not arrived.is_floating_point():  # numbers of rows
            return work
        events.append("begun")
        return Noted(work)

    dist.all_to_all_single = noted
    try:
        yield
    finally:
        dist.all_to_all_single = exchange


@contextmanager
def noted_runs(module: torch.nn.Module, events: list[str]) -> Iterator[None]:
    """Notes when a module has run, in the forward and in the backward pass."""
    hooks = [
        module.register_forward_hook(lambda *_: events.append("shared")),
        module.fc2.register_full_backward_hook(lambda *_: events.append("shared")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_shared_experts_run_while_rows_travel(run_distributed: Any) -> None:
    for rank in run_distributed(note_the_order, processes=2):
        whole, cut_up = rank["whole"], rank["cut"]
        torch.testing.assert_close(cut_up["y"], whole["y"], rtol=0, atol=1e-6)
        torch.testing.assert_close(cut_up["gradient"], whole["gradient"], rtol=0, atol=1e-6)
        there_and_back = ["begun", "shared", "awaited", "begun", "awaited"]
        assert whole["events"] == ["shared", "backward", "shared"]
        assert cut_up["events"] == [*there_and_back, "backward", "begun", "awaited", "begun", "shared", "awaited"]
