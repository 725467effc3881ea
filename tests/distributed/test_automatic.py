"""A run whose plan says ``parallel: auto``: all processes take one layout, say why, and keep it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.disk.run_folder import RunFolder
from engine.estimate.measure import measure_hardware
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.run.automatic import with_layouts
from engine.run.earlier import Earlier, Start
from engine.run.entrance import RunOptions
from engine.run.train import train
from omnivl.errors import UserError

pytestmark = pytest.mark.distributed

PLAN = """
name: auto
seed: 3
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 1, alignment_layers: 1,
  generation_layers: 0, projection_size: 8, image_size: 32, video_size: 32, patch_size: 16, num_frames: 2}
parallel: auto
batch: {global_batch_size: 16}
logging: {every: 1, tensorboard: false}
stages:
  - name: spatial
    steps: 2
    data: [{source: emoji, kind: image_text}]
    objectives: [mlm, univlc]
    optimizer: {lr: 1e-3}
  - name: temporal
    init_from: spatial
    steps: 2
    parallel: {host: zero, zero_stage: 2}
    data: [{source: motion, kind: video_text}]
    objectives: [mlm]
    optimizer: {lr: 1e-3}
"""


def start(folder: str, stage: str | None) -> dict[str, Any]:
    """Worker: enters a run's folder, runs it, and enters it again."""
    read, cpu = parse_plan(PLAN, world_size=dist.get_world_size()), torch.device("cpu")
    run, start = RunFolder(Path(folder)), Start(stage=stage)
    entered, notes = with_layouts(read, Earlier(run), start, cpu)
    assert train(read, RunOptions(run.path, start), cpu) == 0
    again, kept = with_layouts(read, Earlier(run), start, cpu)
    return {
        **{"entered": layouts_of(entered), "notes": notes, "again": layouts_of(again), "kept": kept},
        "written": layouts_of(parse_plan(run.plan.read_text())),
    }


def layouts_of(plan: Plan) -> list[tuple[Any, ...]]:
    return [(vars(one.parallel), vars(one.batch)) for one in plan.stages]


def test_all_processes_take_one_layout_and_keep_it(run_distributed: Any, tmp_path: Path) -> None:
    run = tmp_path / "auto"
    first, second = run_distributed(start, processes=2, folder=str(run), stage="spatial")
    for one in (first, second):
        assert one["again"] == one["written"] == first["written"]
        assert one["kept"] == ["stage spatial: parallel: auto takes what the run began with"]
        assert one["entered"] == first["entered"] and one["notes"] == first["notes"]
    (note,) = first["notes"]
    assert note.startswith("stage spatial: parallel: auto takes ") and "s a step" in note
    (spatial, batch), (temporal, _) = first["written"]
    assert spatial["host"] in ("plain", "zero", "pipeline")
    assert (temporal["host"], temporal["zero_stage"]) == ("zero", 2)
    replicas = 2 // spatial["pipeline_stages"] if spatial["host"] == "pipeline" else 2
    assert batch["micro_batch_size_per_gpu"] * batch["gradient_accumulation_steps"] * replicas == 16
    (whole, _) = run_distributed(start, processes=2, folder=str(run), stage=None)
    assert whole["entered"] == whole["written"] == first["written"]
    assert (run / "stages" / "02-temporal" / "weights.safetensors").is_file()
    # Another number of processes: what was taken for two is not kept.
    (alone,) = run_distributed(start, processes=1, folder=str(run), stage=None)
    assert "s a step" in alone["notes"][0]
    assert alone["again"] == alone["written"]


def enter_a_damaged_folder(folder: str) -> str:
    """Worker: the error of a run whose plan cannot be read; every process has it."""
    run = RunFolder(Path(folder))
    if dist.get_rank() == 0:
        run.path.mkdir(parents=True)
        run.plan.write_bytes(b"\xff\xfe\xff")
    dist.barrier()
    try:
        train(parse_plan(PLAN, world_size=2), RunOptions(run.path), torch.device("cpu"))
    except UserError as error:
        return str(error)
    raise AssertionError("the run began")


def test_no_process_waits_where_the_earlier_plan_cannot_be_read(run_distributed: Any, tmp_path: Path) -> None:
    said = run_distributed(enter_a_damaged_folder, processes=2, limit=60, folder=str(tmp_path / "damaged"))
    assert all("plan.yaml: got a file that cannot be read" in one for one in said)


def measure_two_machines() -> dict[str, Any]:
    """Worker: the profile that processes of two machines measure together."""
    found = measure_hardware(torch.device("cpu"), local_processes=2, seconds=0.01)
    uneven = measure_hardware(torch.device("cpu"), local_processes=1 + dist.get_rank() % 2, seconds=0.01)
    return {"machine": asdict(found), "uneven": uneven.processes_per_node}


def test_links_within_and_between_machines_are_measured(run_distributed: Any) -> None:
    for one in run_distributed(measure_two_machines, processes=4):
        assert one["machine"]["processes_per_node"] == 2
        for link in ("within_node", "between_nodes"):
            assert one["machine"][link]["gigabytes_per_second"] > 0
            assert one["machine"][link]["latency_seconds"] > 0
        assert one["machine"]["within_node"] != one["machine"]["between_nodes"]
        assert one["uneven"] == 1
