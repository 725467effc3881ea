"""Checkpoints without a host: found, described, verified, their weights read and averaged."""

import json
from pathlib import Path

import pytest
import synthetic_chain as synthetic
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.disk.checkpoint import SavedLayout, TrainerState
from engine.disk.checkpoint_writer import CheckpointWriter
from engine.disk.saved import all_checkpoints, average_weights, describe, find_checkpoint, saved_weights
from engine.errors import CheckpointError
from engine.hosts.plain import PlainHost
from engine.step.optimizer import OptimizerConfig
from launcher.commands.checkpoint import app
from omnivl.errors import UserError

LAYOUT = SavedLayout("plain", None, 1, 1, 4)
RUN = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints of one stage, after one and after two steps."""
    host = PlainHost(synthetic.build_synthetic_chain(), OptimizerConfig(lr=1e-2), synthetic.plan_layout, total_steps=4)
    folder = tmp_path / "run" / "stages" / "01-one" / "checkpoints"
    writer = CheckpointWriter(folder, asynchronous=False, keep_last=2)
    for step in (1, 2):
        host.step(synthetic.step_batches(step, 1, 4, host.gather), step)
        state = TrainerState(step=step, layout=LAYOUT)
        writer.save(host, state, {})
    return tmp_path / "run"


def steps_of(run: Path) -> list[Path]:
    return sorted((run / "stages" / "01-one" / "checkpoints").glob("step-*"))


def test_the_newest_whole_checkpoint_is_found_from_every_level(run: Path) -> None:
    first, second = steps_of(run)
    for target in (run, run / "stages" / "01-one", first.parent, second):
        assert find_checkpoint(target) == second
        assert second in all_checkpoints(target)
    (second / "trainer.json").write_text("{}")
    assert find_checkpoint(run) == first
    with pytest.raises(UserError, match="got a path without a whole checkpoint; allowed a step-"):
        find_checkpoint(run.parent)


def test_a_checkpoint_is_described_without_its_tensors(run: Path) -> None:
    saved = describe(find_checkpoint(run))
    chain = synthetic.build_synthetic_chain()
    assert (saved.step, saved.optimizer_steps, saved.layout) == (2, 2, LAYOUT)
    assert saved.bytes == sum(
        file.stat().st_size for file in saved.path.rglob("*") if file.name != "manifest.json" and file.is_file()
    )
    trained = sum(parameter.numel() for parameter in chain.parameters() if parameter.requires_grad)
    twins = sum(one.numel() for name, one in chain.state_dict().items() if ".momentum_" in name)
    totals = {what: sum(counts[what] for counts in saved.parts.values()) for what in ("weights", "twins", "moments")}
    everything = sum(one.numel() for one in chain.state_dict().values())
    assert totals == {"weights": everything - twins, "twins": twins, "moments": 2 * trained}
    assert twins > 0
    told = RUN.invoke(app, ["inspect", str(run), "--json"])
    assert json.loads(told.output)["parts"] == saved.parts
    shown = RUN.invoke(app, ["inspect", str(run)]).output
    assert "step 2, optimizer step 2; written by plain on 1 process, 4 samples a step" in shown


def test_verify_names_the_file_that_differs(run: Path) -> None:
    told = RUN.invoke(app, ["verify", str(run)])
    assert told.exit_code == 0
    assert [line.rpartition(": ")[2] for line in told.output.splitlines()] == ["whole", "whole"]
    damaged = next((steps_of(run)[0] / "host").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    told = RUN.invoke(app, ["verify", str(run)])
    assert told.exit_code == 1
    assert f"host/{damaged.name} does not have the SHA-256 that the manifest says" in told.output.splitlines()[0]
    assert told.output.splitlines()[1].endswith(": whole")


def test_weights_come_out_as_they_went_in(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "weights.safetensors"
    assert RUN.invoke(app, ["convert", str(run), "--out", str(out)]).exit_code == 0
    written, held = load_file(out), dict(saved_weights(find_checkpoint(run)))
    assert written.keys() == held.keys() == synthetic.build_synthetic_chain().state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in held.items())
    half = tmp_path / "half.safetensors"
    RUN.invoke(app, ["convert", str(run), "--out", str(half), "--dtype", "bf16"])
    for name, tensor in load_file(half).items():
        assert torch.equal(tensor, held[name].bfloat16() if held[name].is_floating_point() else held[name])
    refused = RUN.invoke(app, ["convert", str(run), "--out", str(tmp_path / "weights.bin")])
    assert isinstance(refused.exception, UserError)


def test_the_mean_of_checkpoints(run: Path, tmp_path: Path) -> None:
    first, second = (dict(saved_weights(step)) for step in steps_of(run))
    out = tmp_path / "mean.safetensors"
    assert RUN.invoke(app, ["average", *map(str, steps_of(run)), "--out", str(out)]).exit_code == 0
    mean = load_file(out)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, second[name])


def test_checkpoints_of_different_models_have_no_mean(run: Path, tmp_path: Path) -> None:
    weights = dict(saved_weights(find_checkpoint(run)))
    name = next(name for name, tensor in weights.items() if tensor.dim() == 2)
    other = tmp_path / "other.safetensors"
    save_file({**weights, name: weights[name][:1].clone()}, other)
    with pytest.raises(CheckpointError, match=r"has shape \[1, .*allowed are checkpoints of one model"):
        average_weights([find_checkpoint(run), other])
    save_file({key: tensor for key, tensor in weights.items() if key != name}, other)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        average_weights([find_checkpoint(run), other])
    other.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="no safetensors file or is truncated"):
        average_weights([other, other])
