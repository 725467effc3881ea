"""ZeRO-3 on one device equals the plain host. In a separate process: DeepSpeed selects its device once."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import patience
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT_SECONDS = 240


def train(steps: int, precision: str) -> dict[str, Any]:
    """Worker: the same steps on the plain host and under ZeRO-3, from the same weights."""
    import conftest as setting  # of this folder

    from engine.hosts.zero.host import ZeroHost
    from engine.processes.process_group import choose_device

    device, dtype = choose_device(), getattr(torch, precision)
    plain = setting.host_of(dtype, device)
    zero = ZeroHost(
        setting.chain_of(dtype),
        setting.OPTIMIZER,
        setting.partial(setting.plan_layout, setting.OBJECTIVES),
        total_steps=10,
        zero_stage=3,
        micro_batch_size=setting.SIZE,
        device=device,
    )
    report: dict[str, Any] = {"device": device.type}
    kinds = ("image_text", "video_text", "image_label", "video_label")
    for name, host in (("plain", plain), ("zero", zero)):
        results = [host.step([setting.batch_of(kinds[step % 4], step)], step) for step in range(steps)]
        report[name] = {"results": results, "weights": host.full_weights()}
    return report


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_process_under_zero3_equals_the_plain_host(device, relative_distance, tmp_path, precision):
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({"steps": 2, "precision": precision}))
    worker = ROOT / "tests" / "distributed" / "worker.py"
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if device.type == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("DS_ACCELERATOR", None)
    command = [
        sys.executable,
        str(worker),
        __file__,
        "train",
        str(arguments),
        str(tmp_path),
        str(patience.MOST * LIMIT_SECONDS),
    ]
    done = patience.run(command, env=environment, capture_output=True, text=True, limit=LIMIT_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = torch.load(tmp_path / "0.pt", weights_only=False)
    assert report["device"] == device.type
    tolerance = 1e-4 if precision == "float32" else 1e-2
    for ours, theirs in zip(report["zero"]["results"], report["plain"]["results"], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=10 * tolerance)
        assert not ours.skipped
    assert relative_distance(report["zero"]["weights"], report["plain"]["weights"]) < tolerance
