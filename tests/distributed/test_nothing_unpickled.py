"""A whole run of two processes, under ZeRO-3 and in a pipeline, unpickles nothing: neither our code nor DeepSpeed's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from unpickling import UnpickledError, refuse_unpickling

from engine.plan.parse import parse_plan
from engine.processes import ranks
from engine.run.earlier import Start
from engine.run.entrance import RunOptions
from engine.run.train import train
from omnivl.errors import UserError

pytestmark = pytest.mark.distributed

PLAN = """
name: plain
seed: 3
model: {preset: tiny, hidden_size: 24, num_heads: 2, vision_layers: 2, text_layers: 2, alignment_layers: 1,
  generation_layers: 1, projection_size: 8, image_size: 32, video_size: 32, patch_size: 16, num_frames: 2,
  ffn: {kind: limoe, num_experts: 2, blocks: [-1], router: {kind: token_choice, losses: {importance: 0.01}}}}
parallel: {host: zero, zero_stage: 3, precision: auto}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}
logging: {every: 1, tensorboard: false}
checkpoint: {every: 2, keep_best: "drawn/image->text R@1"}
stages:
  - name: spatial
    steps: 3
    data: [{source: emoji, kind: image_text, where: {split: [train]}}]
    objectives: [mlm, {kind: univlc, queue_size: 8}]
    optimizer: {lr: 1e-3}
    evaluate:
      every: 2
      tasks: [{kind: retrieval, name: drawn, source: emoji, where: {split: [val]}, max_samples: 8}]
  - name: temporal
    init_from: spatial
    steps: 2
    parallel: {host: pipeline, pipeline_stages: 2, zero_stage: 1}
    data: [{source: motion, kind: video_text}]
    objectives: [mlm]
    optimizer: {lr: 1e-3}
"""


def run_without_pickle(folder: str, plan: str) -> dict[str, Any]:
    """Worker: a run, stopped after its first stage and resumed."""
    refuse_unpickling()
    read = parse_plan(plan, world_size=2)
    for stage in ("spatial", None):
        assert train(read, RunOptions(Path(folder), Start(stage=stage)), torch.device("cpu")) == 0
    return {"done": True}


def test_a_run_unpickles_nothing(run_distributed: Any, tmp_path: Path) -> None:
    run = tmp_path / "plain"
    got = run_distributed(run_without_pickle, processes=2, limit=150, folder=str(run), plan=PLAN)
    assert got == [{"done": True}] * 2
    for stage in ("01-spatial", "02-temporal"):
        assert (run / "stages" / stage / "weights.safetensors").is_file()
    assert json.loads((run / "stages" / "01-spatial" / "evaluation.json").read_text())


def exchange_and_refuse() -> dict[str, Any]:
    """Worker: what torch's own exchange of objects does here, and ours."""
    refuse_unpickling()
    with pytest.raises(UnpickledError):
        dist.all_gather_object([None, None], 1)
    dist.barrier()
    me = ranks.rank()

    def mistaken() -> int:
        raise UserError("of the first one")

    with pytest.raises(UserError, match="of the first one"):
        ranks.on_first(mistaken, int)
    with pytest.raises(ValueError, match=r"value\[1\]: got str|size -1"):
        ranks.on_first(lambda: "no number", int)
    with pytest.raises(ValueError, match=r"value: got str|size -1"):
        ranks.gather("text" if me == 1 else 1, int)
    return {
        "gathered": ranks.gather(["x" * me, me], list[Any]),
        "nothing": ranks.on_first(lambda: object()),
        "path": str(ranks.on_first(lambda: Path("a\udcff"), Path)),
    }


def test_objects_are_refused_and_plain_data_arrives(run_distributed: Any) -> None:
    expected = {"gathered": [["", 0], ["x", 1]], "nothing": None, "path": "a\udcff"}
    assert run_distributed(exchange_and_refuse, processes=2) == [expected] * 2
