"""State of hosts between steps: files, whole weights, twins, and the effect of skipped steps."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_chain as synthetic
import torch

from engine.disk.checkpoint import SavedLayout, TrainerState, checkpoint_steps, find_fault
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.errors import CheckpointError
from engine.hosts import shards
from engine.hosts.base import Host
from engine.hosts.pipeline.cut import cut
from engine.hosts.pipeline.division import divide_chain
from engine.hosts.pipeline.host import PipelineHost
from engine.hosts.pipeline.place import place_in_pipeline
from engine.hosts.plain import PlainHost
from engine.hosts.saved_tensors import SavedTensors
from engine.hosts.zero.host import ZeroHost
from engine.plan.parallel import Offloading
from engine.processes import ranks
from engine.processes.collectives import make_gather
from engine.step.muon import MuonConfig
from engine.step.optimizer import OptimizerConfig

HOSTS = ["plain", "zero0", "zero1", "zero2", "zero3"]
PIPELINES = ["pipe2-zero0", "pipe2-zero1"]
MUON_HOSTS = ["plain-muon", "zero1-muon", "zero2-offload-muon", "zero3-muon", "zero3-files-muon", "pipe2-zero1-muon"]
EVERY = [*HOSTS, "zero2-offload", "zero3-offload", "zero3-files", *PIPELINES, *MUON_HOSTS]
CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, gradient_clipping=0.5, schedule="cosine", layer_decay=0.7)
MUON = replace(CONFIG, kind="muon", muon=MuonConfig(lr=1e-2, weight_decay=0.1))
JOINED = 8

pytestmark = pytest.mark.distributed


def make_host(name: str, seed: int = 0) -> Host:
    config = MUON if name.endswith("-muon") else CONFIG
    name = name.removesuffix("-muon")
    pipeline = name in PIPELINES
    gather = make_gather(place_in_pipeline(2).data_group if pipeline else None)
    chain = synthetic.build_synthetic_chain(gather, seed=seed)
    common: dict[str, Any] = {"total_steps": 8, "gradient_accumulation_steps": 2}
    if name == "plain":
        return PlainHost(chain, config, synthetic.plan_layout, **common)
    common |= {"micro_batch_size": JOINED // gather.replicas}
    if pipeline:
        division = divide_chain(chain, cut([1.0] * len(chain.passes), 2))
        return PipelineHost(chain, config, synthetic.plan_layout, division=division, zero_stage=int(name[-1]), **common)  # type: ignore[arg-type]
    parts = name.split("-")
    files = Path("states") if "files" in parts else None
    offload = Offloading(optimizer="offload" in parts or "files" in parts, parameters="files" in parts, folder=files)
    common |= {"zero_stage": int(name[len("zero")]), "offload": offload}
    return ZeroHost(chain, config, synthetic.plan_layout, **common)


def train(host: Host, steps: range) -> list[Any]:
    return [host.step(synthetic.step_batches(step, 2, JOINED, host.gather), step) for step in steps]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def train_whole_and_first_half(folder: str) -> dict[str, Any]:
    """Worker: six steps at a stretch, and three steps that are saved."""
    report = {}
    for name in EVERY:
        whole = make_host(name)
        results = train(whole, range(6))
        half = make_host(name)
        train(half, range(3))
        half.save(Path(folder) / name)
        report[name] = {"results": results[3:], "weights": whole.full_weights()}
    return report


def train_second_half(folder: str) -> dict[str, Any]:
    """Worker: loads what the first half saved into a host of other weights, and goes on."""
    report = {}
    for name in EVERY:
        host = make_host(name, seed=1)
        host.load(Path(folder) / name)
        results = train(host, range(3, 6))
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


def test_fresh_processes_resume_bit_for_bit(run_distributed: Any, tmp_path: Path) -> None:
    whole = run_distributed(train_whole_and_first_half, processes=2, folder=str(tmp_path / "saved"))[0]
    resumed = run_distributed(train_second_half, processes=2, folder=str(tmp_path / "saved"))[0]
    for name in EVERY:
        assert resumed[name]["results"] == whole[name]["results"], name
        assert_same(resumed[name]["weights"], whole[name]["weights"])
    # Not compared with nothing: twins, queue and its cursor are among the weights and have moved.
    start = synthetic.build_synthetic_chain().state_dict()
    for key in ("visual_00.momentum_block.inner.weight", "contrast.queue", "contrast.filled", "contrast.cursor"):
        assert not torch.equal(whole["zero3"]["weights"][key], start[key]), key


def go_on_elsewhere(folder: str) -> dict[str, Any]:
    """Worker: what each host with Muon saved goes on in every other one."""
    first = make_host(MUON_HOSTS[0])
    train(first, range(3))
    report = {}
    for source in MUON_HOSTS:
        saving = make_host(source)
        train(saving, range(3))
        saving.save(Path(folder) / source)
        for name in MUON_HOSTS:
            host = make_host(name, seed=1)
            host.load(Path(folder) / source)
            train(host, range(3, 6))
            report[f"{source} to {name}"] = host.full_weights()
    train(first, range(3, 6))
    adamw = make_host("plain")
    return {
        "went on": report,
        "whole": first.full_weights(),
        "refused": _loading_refusal(adamw, f"{folder}/zero3-muon"),
    }


def test_momentum_of_muon_goes_from_layout_to_layout(run_distributed: Any, tmp_path: Path) -> None:
    ranks = run_distributed(go_on_elsewhere, processes=2, folder=str(tmp_path))
    assert len(ranks[0]["went on"]) == len(MUON_HOSTS) ** 2
    for run, weights in ranks[0]["went on"].items():
        for key, tensor in ranks[0]["whole"].items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{run} {key}")
    assert "exp_avg_sq/visual_00.block.inner.weight" in ranks[0]["refused"]  # AdamW's, which Muon does not have


POISONS = ("loss", "gradient")


def poison_steps() -> dict[str, Any]:
    """Worker: steps 0 and 1, a step 2 that is poisoned on the last replica only, in two ways, steps 3 and 4."""
    report = {}
    for name in EVERY:
        host = make_host(name)
        train(host, range(2))
        spoilt: dict[str, Any] = {"before": host.full_weights()}
        for poison in POISONS:
            handle = _poison(host, poison)
            skipped = train(host, range(2, 3))[0]
            if handle is not None:
                handle.remove()
            spoilt[poison] = {"skipped": skipped, "after": host.full_weights()}
        after = {"results": train(host, range(3, 5)), "weights": host.full_weights()}
        report[f"{name}, spoilt"] = spoilt | after
        clean = make_host(name)
        train(clean, range(2))
        report[name] = {"results": train(clean, range(3, 5)), "weights": clean.full_weights()}
    return report


def _poison(host: Host, what: str) -> Any:
    if host.gather.replica != host.gather.replicas - 1:
        return None
    if what == "loss":  # the loss is not finite, its gradient is
        return host.chain.layers[-1].register_forward_hook(
            lambda module, args, state: state.merged({"loss": state["loss"] + math.nan})
        )
    return host.chain.layers[0].register_forward_hook(lambda module, args, state: _with_infinite_gradient(state))


def _with_infinite_gradient(state: Any) -> Any:
    text = state["text"].clone()
    text.register_hook(lambda gradient: gradient * math.inf)
    return state.updated(text=text)


def test_every_replica_skips_a_step_that_is_not_finite_on_one(run_distributed: Any) -> None:
    ranks = run_distributed(poison_steps, processes=2)
    for name in EVERY:
        spoilt, clean = ranks[0][f"{name}, spoilt"], ranks[0][name]
        for poison in POISONS:
            assert all(rank[f"{name}, spoilt"][poison]["skipped"].skipped for rank in ranks), (name, poison)
            assert math.isnan(spoilt[poison]["skipped"].loss) == (poison == "loss"), (name, poison)
            assert_same(spoilt[poison]["after"], spoilt["before"])
        # Optimizer, momentum and the queue's outbox too: what follows equals a run that never saw these steps.
        assert spoilt["results"] == clean["results"], name
        assert_same(spoilt["weights"], clean["weights"])


def hand_over(folder: str) -> dict[str, Any]:
    """Worker: whole weights of a trained host go into each other host, which trains on; evaluation between steps."""
    source = make_host("plain", seed=3)
    train(source, range(2))
    weights = source.full_weights()
    report: dict[str, Any] = {"given": weights}
    for name in [*HOSTS, *PIPELINES]:
        host = make_host(name, seed=4)
        matched = host.load_weights(weights)
        taken = host.full_weights()
        train(host, range(1))
        evaluated = _visual_embedding(host)
        train(host, range(1, 3))
        report[name] = {
            **{"matched": matched, "taken": taken, "weights": host.full_weights(), "evaluated": evaluated},
            **{"strict": _refusal(host, weights), "loading": _loading_refusal(host, folder)},
        }
    return report


def _visual_embedding(host: Host) -> torch.Tensor:
    """Calls layers one by one without gradient, as evaluation does."""
    batch = synthetic.joined_batch(7, 4, "image_text")
    layout = synthetic.plan_layout("image_text", 4, 1)
    state = synthetic.State.from_batch(batch, layout)
    host.chain.eval()
    with torch.no_grad(), host.whole_chain() as chain:
        for layer in chain.layers[:3]:
            state = layer(state)
    host.chain.train()
    return state["visual"]


def memory_of_a_stage() -> dict[str, int]:
    """Worker: bytes of the chain's tensors that a process of a pipeline holds, before, during and after evaluation."""
    host = make_host("pipe2-zero1")
    train(host, range(1))
    own = sum(tensor.nbytes for name in host._own for tensor in host.chain.get_submodule(name).state_dict().values())  # type: ignore[attr-defined]
    found = {"own": own, "training": _bytes_held(host)}
    with host.whole_chain():
        found["evaluating"] = _bytes_held(host)
    host.full_weights()
    return {**found, "after": _bytes_held(host)}


def _bytes_held(host: Host) -> int:
    tensors = host.chain.state_dict().values()
    return sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().nbytes() > 0)


def test_a_process_of_a_pipeline_holds_its_stage_only(run_distributed: Any) -> None:
    whole = sum(tensor.nbytes for tensor in make_host("plain").chain.state_dict().values())
    stages = run_distributed(memory_of_a_stage, processes=2)
    assert sum(stage["own"] for stage in stages) == whole
    for stage in stages:
        assert 0 < stage["own"] < whole
        assert stage["training"] == stage["after"] == stage["own"]
        assert stage["evaluating"] == whole


def _refusal(host: Host, weights: Any) -> str:
    try:
        host.load_weights(None if weights is None else {**weights, "stray": torch.zeros(1)})
    except CheckpointError as error:
        return str(error)
    return "accepted"


def _loading_refusal(host: Host, folder: str) -> str:
    try:
        host.load(Path(folder))
    except CheckpointError as error:
        return str(error)
    return "accepted"


def test_whole_weights_go_from_host_to_host(run_distributed: Any, tmp_path: Path) -> None:
    ranks = run_distributed(hand_over, processes=2, folder=str(tmp_path))
    given = ranks[0]["given"]
    for name in [*HOSTS, *PIPELINES]:
        for rank in ranks:
            assert len(rank[name]["matched"].matched) == len(given)
            assert rank[name]["strict"] == (
                "weights: missing none; unexpected stray; allowed are exactly the model's own names:"
                " load without strict to keep what is missing"
            )
            assert ": not found; allowed is a folder that a host saved" in rank[name]["loading"]
            torch.testing.assert_close(rank[name]["evaluated"], ranks[0]["plain"]["evaluated"], rtol=1e-5, atol=1e-6)
        assert_same(ranks[0][name]["taken"], given)
        # The optimizer works on the weights that were handed in, not on a copy of the old ones.
        for key, tensor in ranks[0]["plain"]["weights"].items():
            torch.testing.assert_close(
                ranks[0][name]["weights"][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
            )


def save_on_disks_of_which_one_is_full(folder: str) -> dict[str, Any]:
    """Worker: the last replica's disk is full at the second checkpoint."""
    report: dict[str, Any] = {}
    write = shards.write_ranges

    def full(path: Path, *what: Any) -> Any:
        if make_gather().replica == 1:
            raise OSError(28, "No space left on device")
        return write(path, *what)

    for name in HOSTS:
        for asynchronous in (False, True):
            host, run = make_host(name), f"{name} {asynchronous}"
            place = Path(folder) / run
            writer = CheckpointWriter(place, asynchronous=asynchronous, keep_last=2)
            train(host, range(1))
            writer.save(host, state_after(1), {})
            writer.finish()
            train(host, range(1, 2))
            shards.write_ranges = full
            try:
                writer.save(host, state_after(2), {})
                report[f"{run} went on"] = True
                writer.finish()
            except CheckpointError as error:
                report[run] = str(error)
            shards.write_ranges = write
            report[f"{run} left"] = sorted(path.name for path in place.iterdir())
            report[f"{run} fault"] = find_fault(place / "step-000001")
            train(host, range(2, 3))  # nobody was left waiting
    return report


def test_a_disk_that_is_full_on_one_replica_stops_all_and_spoils_nothing(run_distributed: Any, tmp_path: Path) -> None:
    for rank in run_distributed(save_on_disks_of_which_one_is_full, processes=2, folder=str(tmp_path)):
        for run in [f"{name} {asynchronous}" for name in HOSTS for asynchronous in (False, True)]:
            assert "could not be written (process 1: " in rank[run], run
            assert "No space left on device" in rank[run]
            assert "step-000001 is left as it was" in rank[run]
            assert rank[f"{run} left"] == ["step-000001"]
            assert rank[f"{run} fault"] is None
            assert (f"{run} went on" in rank) == run.endswith("True")


def save_behind_training(folder: str) -> dict[str, Any]:
    """Worker: one checkpoint at once, another of the same step whose writing lasts until two steps later."""
    write, report = shards.write_ranges, {}
    released = threading.Event()

    def late(path: Path, *what: Any) -> Any:
        assert released.wait(60)
        return write(path, *what)

    for name in EVERY:
        host = make_host(name)
        train(host, range(2))
        report[f"{name} bytes"] = sum(piece.held.nbytes for piece in host.shard().pieces)
        at_once, behind = (
            CheckpointWriter(Path(folder) / name / how, asynchronous=how == "behind", keep_last=2)
            for how in ("at once", "behind")
        )
        at_once.save(host, state_after(2), {"micro_step": 4})
        shards.write_ranges = late
        behind.save(host, state_after(2), {"micro_step": 4})
        torch.rand(1)
        for step in (2, 3):
            train(host, range(step, step + 1))
            behind.poll(any(ranks.gather(behind.is_writing, bool)))
        report[f"{name} while"] = checkpoint_steps(Path(folder) / name / "behind")
        released.set()
        behind.save(host, state_after(4), {"micro_step": 8})  # waits for the one before
        behind.finish()
        shards.write_ranges = write
        released.clear()
        report[f"{name} after"] = checkpoint_steps(Path(folder) / name / "behind")
    return report


def test_a_checkpoint_is_of_the_step_at_which_it_was_taken(run_distributed: Any, tmp_path: Path) -> None:
    """Whatever happens while it is written: its files are byte for byte those of a save that stops training."""
    ranks = run_distributed(save_behind_training, processes=2, folder=str(tmp_path))
    for name in EVERY:
        at_once, behind, later = (
            json.loads((tmp_path / name / one / "manifest.json").read_bytes())
            for one in ("at once/step-000002", "behind/step-000002", "behind/step-000004")
        )
        assert at_once == behind, name
        assert find_fault(tmp_path / name / "behind/step-000002") is None
        assert list(at_once["files"]) == ["host/index.json", "host/shard-00000.safetensors", "trainer.json"]
        then, afterwards = (one["files"]["host/shard-00000.safetensors"] for one in (at_once, later))
        assert len(then) == len(afterwards) == 4, "header and data of each process"
        for process in (0, 1):
            assert then[2 + process]["sha256"] != afterwards[2 + process]["sha256"], (name, process)
        for rank in ranks:
            assert (rank[f"{name} while"], rank[f"{name} after"]) == ([], [2, 4]), name
        saved = SavedTensors(tmp_path / name / "behind/step-000002/host")
        least, most = sorted(rank[f"{name} bytes"] for rank in ranks)
        assert least + most == sum(saved.whole(key).nbytes for key in saved.shapes), f"{name}: every element once"
        assert most < 1.05 * least or name.startswith("pipe"), f"{name}: stages differ in size, shares do not"


def state_after(step: int) -> TrainerState:
    return TrainerState(step=step, layout=SavedLayout("zero", 3, 2, 1, JOINED))
