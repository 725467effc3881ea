"""Layers on two pipeline stages: copies stay equal, are saved once, and any layout resumes from the files.

The model runs all its blocks twice; it has momentum twins, a queue, and experts whose selection bias follows the tokens
of both passes.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layouts import Model, make_host
from unpickling import refuse_unpickling

from engine.hosts.base import Host
from engine.hosts.pipeline.host import PipelineHost
from engine.hosts.saved_tensors import SavedTensors

MODEL, STEPS, SAVED = "real-unified-balanced", 4, 2
PIPELINES = ["pipe2-zero0", "pipe2-zero1"]

pytestmark = pytest.mark.distributed


def train(host: Host, steps: range) -> list[Any]:
    return [host.step(Model(MODEL).batches(step, host.gather), step) for step in steps]


def copies(host: Host) -> dict[str, torch.Tensor]:
    """What this stage holds of the layers that stand on two."""
    assert isinstance(host, PipelineHost)
    return {
        f"{name}.{key}": tensor.clone()
        for name in host.division.tied
        for key, tensor in host.chain.get_submodule(name).state_dict().items()
    }


def train_save_and_skip(folder: str) -> dict[str, Any]:
    """Worker: all steps at a stretch with one in between that is skipped, and the first ones, which are saved."""
    report = {}
    for name in PIPELINES:
        whole = make_host(name, Model(MODEL))
        first = train(whole, range(SAVED))
        before = whole.full_weights()
        handle = whole.chain.layers[-1].register_forward_hook(
            lambda module, args, state: state.merged({"loss": state["loss"] + math.nan})
        )
        skipped = train(whole, range(SAVED, SAVED + 1))[0].skipped
        handle.remove()
        after = whole.full_weights()
        results = train(whole, range(SAVED, STEPS))
        half = make_host(name, Model(MODEL))
        train(half, range(SAVED))
        half.save(Path(folder) / name)
        assert isinstance(whole, PipelineHost)
        report[name] = {
            **{"results": [*first, *results], "weights": whole.full_weights(), "copies": copies(whole)},
            **{"skipped": skipped, "before": before, "after": after, "tied": whole.division.tied},
        }
    return report


def load_and_go_on(folder: str, pairs: list[tuple[str, str]], out: str) -> dict[str, Any]:
    """Worker: loads what one host saved into another of other weights, saves that again, and trains on."""
    report = {}
    for saved, name in pairs:
        host = make_host(name, Model(MODEL), seed=1)
        host.load(Path(folder) / saved)
        host.save(Path(out) / f"{saved}+{name}")
        results = train(host, range(SAVED, STEPS))
        report[f"{saved}+{name}"] = {"results": results, "weights": host.full_weights()}
    return report


def read(folder: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(folder)
    return {key: saved.whole(key) for key in saved.shapes}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_copies_are_alike_and_every_layout_goes_on_from_them(run_distributed: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    ranks = run_distributed(train_save_and_skip, processes=2, folder=folder)
    plain = make_host("plain", Model(MODEL))
    train(plain, range(SAVED))
    plain.save(tmp_path / "saved" / "plain")
    start = Model(MODEL).build(plain.gather).state_dict()
    for name in PIPELINES:
        first, second = ranks[0][name], ranks[1][name]
        assert "unified_00" in first["tied"]
        assert_same(second["copies"], first["copies"])
        moved = {key for key in first["copies"] if not torch.equal(first["copies"][key], start[key])}
        assert {key.split(".")[1] for key in moved} == {"block", "momentum_block"}
        assert any("bias_E" in key for key in moved)
        assert first["skipped"] and second["skipped"]
        assert_same(first["after"], first["before"])
        # Every element once, of layers that stand on two stages too, and the moments of all that is trained.
        assert read(Path(folder) / name).keys() == read(tmp_path / "saved" / "plain").keys()

    again = [(name, name) for name in PIPELINES]
    elsewhere = [("pipe2-zero0", "zero3"), ("pipe2-zero1", "pipe2-zero0"), ("plain", "pipe2-zero1")]
    out = tmp_path / "out"
    report = run_distributed(load_and_go_on, processes=2, folder=folder, pairs=again + elsewhere, out=str(out))[0]
    for saved, name in again + elsewhere:
        assert_same(read(out / f"{saved}+{name}"), read(Path(folder) / saved))
        got, whole = report[f"{saved}+{name}"], ranks[0][name if name in PIPELINES else saved]
        if saved == name:
            assert got["results"] == whole["results"][SAVED:]
            assert_same(got["weights"], whole["weights"])
        for ours, theirs in zip(got["results"], whole["results"][SAVED:], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5), f"{saved} to {name}"
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-4), f"{saved} to {name}"
        for key, tensor in whole["weights"].items():
            torch.testing.assert_close(got["weights"][key], tensor, rtol=1e-4, atol=5e-5, msg=f"{saved}, {name}: {key}")


def memory_of_stages() -> dict[str, Any]:
    """Worker: bytes of weights and of optimizer states on this process, and what it holds."""
    host = make_host("pipe2-zero0", Model(MODEL))
    train(host, range(1))
    assert isinstance(host, PipelineHost)
    held = [tensor for tensor in host.chain.state_dict().values() if tensor.untyped_storage().nbytes() > 0]
    moments = [state["exp_avg"] for state in host._optimizer.state.values() if state["exp_avg"].numel() > 1]
    stage = host.place.stage
    gradients = [one for one in host.chain.parameters() if one.grad is not None]
    return {
        **{"weights": sum(tensor.numel() for tensor in held), "moments": sum(one.numel() for one in moments)},
        **{"owned": host.division.owned(stage), "held": host.division.held(stage), "gradients": len(gradients)},
    }


def test_a_layer_on_two_stages_has_one_optimizer_state(run_distributed: Any) -> None:
    chain = Model(MODEL).build(make_host("plain", Model(MODEL)).gather)
    first, second = run_distributed(memory_of_stages, processes=2)
    trained = sum(one.numel() for one in chain.parameters() if one.requires_grad)
    # Parameters of one element are left out on either side: fillers are such, and the temperature.
    single = sum(one.numel() for one in chain.parameters() if one.requires_grad and one.numel() == 1)
    assert first["moments"] + second["moments"] == trained - single
    assert sorted(first["owned"] + second["owned"]) == sorted(name for name, _ in chain.named_children())
    for stage in (first, second):
        size = sum(one.numel() for name in stage["held"] for one in chain.get_submodule(name).state_dict().values())
        assert stage["weights"] == size
        assert len(stage["owned"]) < len(stage["held"])
        assert stage["gradients"] == 0


def bytes_that_are_read(path: str) -> str:
    """Worker: whether a pipeline's step ever unpickles."""
    model = Model(MODEL)
    host = make_host("pipe2-zero1", model)
    train(host, range(1))
    refuse_unpickling()
    train(host, range(1, 2))
    return path


def test_a_step_unpickles_nothing(run_distributed: Any) -> None:
    assert run_distributed(bytes_that_are_read, processes=2, path="done") == ["done", "done"]
