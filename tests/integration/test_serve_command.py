"""``omnivl serve`` on a run folder, with its own weights: the command as it is typed, until Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import patience
import pytest
from colour_gallery import colours_shard, picture, png
from complete_run import write_complete_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration

PLAN = f"""
name: tiny
model:
  preset: {ROOT / "configs" / "models" / "debug.yaml"}
  ffn: {{kind: limoe, num_experts: 4, every: 1}}
stages:
  - name: joint
    steps: 5
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc]
    optimizer: {{warmup_steps: 1}}
"""


def test_a_run_is_served_until_ctrl_c(tmp_path: Path) -> None:
    run, shard = write_complete_run(tmp_path / "tiny", PLAN, stages=1), colours_shard(tmp_path)
    command = [sys.executable, "-m", "launcher.cli", "serve", str(run), "--data", str(shard), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("try it: ")), "")
        assert line, "it never said where the page is"
        url = line.split()[2]
        asked = urllib.request.Request(f"{url}api/text", b'{"text": "a red one"}', {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=patience.seconds(30)) as reply:
            answer = json.load(reply)
        assert len(answer["results"]) == 14 and all(-1.001 <= one["score"] <= 1.001 for one in answer["results"])
        assert [word["word"] for word in answer["routing"][0]["words"]][1:3] == ["a", "red"]
        asked = urllib.request.Request(f"{url}api/picture", png(picture("red")), {"Content-Type": "image/png"})
        with urllib.request.urlopen(asked, timeout=patience.seconds(30)) as reply:
            answer = json.load(reply)
        assert answer["results"][0]["label"] == "red" and answer["results"][0]["score"] > 0.999, "it is in the shard"
        assert {one["label"] for one in answer["labels"]} == {"red", "green", "blue"}
        assert sum(answer["routing"][0]["shares"]) == pytest.approx(1)
        assert "which does not train 'lm'" in answer["caption"]["why"]
        os.kill(process.pid, signal.SIGINT)
        rest, _ = patience.communicate(process, 60)
        assert (process.returncode, rest) == (0, "ended\n")
        assert list(tmp_path.glob("serve-*.safetensors")) != []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
