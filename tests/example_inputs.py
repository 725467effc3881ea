"""The files that the examples of ``--help`` name, as small as they can be, and stand-ins for Slurm's commands."""

import json
import shutil
from pathlib import Path

import converter_inputs
import media_files
import yaml
from converter_inputs import INPUTS
from documentation import ROOT

from engine.plan.parse import load_plan

_OLD_PLAN = """name: old
model: {preset: tiny, architecture: unified}  # one transformer
stages:
  - name: a
    steps: 4
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc]
"""
_SQUEUE = '#!/bin/bash\necho "4|RUNNING|n1"\n'
_SBATCH = "#!/bin/bash\necho 4\n"


def write_inputs(folder: Path) -> None:
    """Pictures, clips, their lists, an old plan, and a run that was submitted; ``configs`` is the repository's own."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "plan.yaml").write_text(_OLD_PLAN)
    _write_media(folder)
    _write_tables(folder)
    _write_forms(folder)
    _write_run(folder / "runs" / "quickstart")
    for name, script in (("squeue", _SQUEUE), ("sbatch", _SBATCH)):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)


def write_separated_list(folder: Path, separator: str) -> None:
    """``list.csv``, whose columns the examples part in two ways; the paths are in both columns that they name."""
    rows = (["path", "file", "title", "alt"], *([f"pictures/dog/{n}.jpg"] * 2 + [f"dog {n}", "a dog"] for n in (0, 1)))
    _lines(folder / "list.csv", [separator.join(row) for row in rows])


def _write_media(folder: Path) -> None:
    picture, clip = media_files.saved("JPEG"), media_files.clip()
    for name in ("pictures/dog/0.jpg", "pictures/dog/1.jpg", "0.jpg", "1.jpg"):
        _put(folder / name, picture)
    _put(folder / "clips" / "dog" / "a.mp4", clip)


def _write_tables(folder: Path) -> None:
    _lines(folder / "cc3m.tsv", ["file\tcaption", '0.jpg\t"a dog', "1.jpg\ta cat"])
    _lines(folder / "pairs.csv", ["a,b,text", "0.jpg,1.jpg,a dog and a cat"])
    _json(folder / "vqa.json", [{"image": "0.jpg", "question": "what?", "answers": ["dog"]}])


def _write_forms(folder: Path) -> None:
    """Of each public data set what its examples name."""
    for given in INPUTS.values():
        given.write(folder)
    converter_inputs.captions(folder)
    converter_inputs.nocaps(folder)


def _write_run(run: Path) -> None:
    """A run that was submitted and has not begun."""
    (run / "slurm").mkdir(parents=True)
    (run / "plan.yaml").write_text(load_plan(ROOT / "configs" / "plans" / "quickstart.yaml").to_yaml())
    _lines(run / "slurm" / "jobs.jsonl", [json.dumps({"job": 4, "stage": None, "folders": [str(run)]})])


def own_configs(folder: Path) -> None:
    """Makes the repository's ``configs`` the folder's own, for a command that writes there."""
    (folder / "configs").unlink()
    shutil.copytree(ROOT / "configs", folder / "configs")


def write_plan_of_eight(folder: Path) -> None:
    """``plan.yaml`` for eight processes on a small machine."""
    plan = yaml.safe_load((folder / "configs" / "plans" / "clip_tiny.yaml").read_text())
    plan |= {"name": "eight", "launch": {}, "parallel": {"host": "plain", "precision": "fp32"}}
    plan["loader"] = {"num_workers": 0}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
