"""Makes the old runs that later code has to read: ``finished.tar.xz``, ``stopped.tar.xz``, and what is known of them.

python tests/integration/old_runs/make.py FOLDER      # where to; the archives here are never replaced
python tests/integration/old_runs/make.py --go-on     # stopped.json anew, by going on with the stopped run

Version 0.1.0 wrote the archives beside this file (commit in each ``environment.json``). They are not made again when
the code changes, since they test that old files can be read. A version that changes the content of a run folder makes
further archives in another folder. What the stopped run comes to (``stopped.json``) is of version 0.1.0 up to the stop;
what follows was recorded anew when losses became means over all micro-batches of a step, instead of means of their
means. Pages, which ``omnivl report`` and ``evaluate`` make again, and heartbeats are left
out; the machine's name and folders are replaced. The compression is xz, since each file has the untrained rows of the
vocabulary: with gzip the archives are twice as large.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import patience
from golden.runs import ROOT, command_line, fingerprint, read_record, start, write_record

HERE = Path(__file__).parent
STOP_AFTER = 6  # steps of the second stage, or a little later
_LEFT_OUT = ("report.html", "routing.html", "heartbeats")


def make(folder: Path) -> None:
    """Makes both runs and what is known of them."""
    with tempfile.TemporaryDirectory(prefix="old") as name:
        place = Path(name)
        command_line(["pretrain", str(HERE / "finished.yaml"), "--run-folder", "finished"], place)
        pack(place / "finished", folder / "finished.tar.xz")
        known = {"machine": fingerprint(), "scores": scores(place / "finished"), **exported(place / "finished", place)}
        write_record(folder / "finished.json", known)

        plan = str(HERE / "stopped.yaml")
        command_line(["pretrain", plan, "--run-folder", "whole"], place)
        _stop(plan, place)
        pack(place / "stopped", folder / "stopped.tar.xz")
        write_record(folder / "stopped.json", read_record(place / "whole" / "stages" / "02-joint"))


def scores(run: Path) -> dict[str, float]:
    """What ``omnivl evaluate`` says of a run, by task and metric."""
    out = run.parent / "scores.json"
    command_line(["evaluate", str(run), "--out", str(out)], run.parent)
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    return {f"{score['task']}: {score['metric']}": score["value"] for one in results for score in one["scores"]}


def exported(run: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What a run's export makes of fixed pictures, a clip and texts, once transformers has loaded it."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    import omnivl.hub  # noqa: F401  makes the model known to transformers

    command_line(["export", str(run), str(folder / "hub")], folder)
    model, processor = AutoModel.from_pretrained(folder / "hub"), AutoProcessor.from_pretrained(folder / "hub")
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    with torch.no_grad():
        inputs = processor(images=pictures[:2], text=["a red heart", "a dog"])
        out = model(**inputs, use_itm_head=True)
        clips = model.get_video_features(**processor(videos=[pictures[2:]])).pooler_output
        words = processor.batch_decode(model.generate(**inputs))
    found = {"images": out.image_embeds, "texts": out.text_embeds, "clips": clips, "logits": out.logits_per_image}
    embeddings = {name: tensor.tolist() for name, tensor in {**found, "matching": out.itm_score}.items()}
    return {"embeddings": embeddings, "captions": {"words": words}}


def pack(run: Path, archive: Path) -> None:
    """Writes a run folder without what names the machine."""
    environment = run / "environment.json"
    told = json.loads(environment.read_text(encoding="utf-8"))
    command = ["launcher/worker.py", "--run-folder", run.name, "--", "plan.yaml"]
    told |= {"hostname": "machine", "platform": sys.platform, "command": command, "git": _commit_of_the_packages()}
    environment.write_text(json.dumps(told, indent=1), encoding="utf-8")
    (run / "run.lock").write_text("process 1234 on host machine\n", encoding="utf-8")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "x:xz", preset=9) as out:
        for file in sorted(path for path in run.rglob("*") if path.is_file()):
            within = file.relative_to(run.parent)
            if any(part in _LEFT_OUT for part in within.parts):
                continue
            content = file.read_bytes()
            for secret in (str(ROOT), str(run.parent), f"host {socket.gethostname()}", f'"{socket.gethostname()}"'):
                assert secret.encode() not in content, f"{within} holds {secret}"
            entry = tarfile.TarInfo(str(within))
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))


def _commit_of_the_packages() -> dict[str, Any]:
    """The commit that the code of the packages is of, whatever else has been committed since."""
    git, packages = ["git", "-C", str(ROOT)], ["--", "moe", "omnivl", "engine", "launcher"]
    commit = subprocess.run([*git, "log", "-1", "--format=%H", *packages], capture_output=True, text=True, check=True)
    changes = subprocess.run([*git, "status", "--porcelain", *packages], capture_output=True, text=True, check=True)
    return {"commit": commit.stdout.strip(), "changed": bool(changes.stdout.strip())}


def unpack(name: str, folder: Path) -> Path:
    """Lays an old run down somewhere and returns its folder."""
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def _stop(plan: str, place: Path) -> None:
    """Runs until the second stage has taken some steps, and stops as a cluster would."""
    metrics = place / "stopped" / "stages" / "02-joint" / "metrics.jsonl"
    process = start(["pretrain", plan, "--run-folder", "stopped"], place)
    limit = patience.Limit(100)
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < STOP_AFTER:
        assert process.poll() is None and not limit.passed(), "it ended before it could be stopped"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = patience.communicate(process, 60)
    assert process.returncode == 128 + signal.SIGTERM, output[-4000:]
    assert not (metrics.parent / "complete.json").exists(), "stopped too late"


def go_on() -> None:
    """Records what the stopped run comes to under the present code. The steps before the stop stay what they were."""
    with tempfile.TemporaryDirectory(prefix="old") as name:
        run = unpack("stopped", Path(name))
        command_line(["pretrain", str(run / "plan.yaml"), "--run-folder", "stopped"], run.parent)
        write_record(HERE / "stopped.json", read_record(run / "stages" / "02-joint"))


if __name__ == "__main__":
    go_on() if sys.argv[1:] == ["--go-on"] else make(Path(sys.argv[1]))
