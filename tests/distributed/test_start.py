"""The start of a stage: process 0 alone draws and reads values, and all processes have them once a host is made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.disk.run_folder import RunFolder
from engine.hosts import create_host, replica_group
from engine.hosts.pipeline.cut import divide_stage
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.processes import ranks
from engine.processes.collectives import make_gather
from engine.processes.seeds import seed_everything
from engine.run.stage_start import start_chain
from engine.step.freeze import freeze_idle
from engine.telemetry.progress import SilentProgress
from moe.routers.base import Router
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.distributed

PLAN = """
name: start
tokenizer: emoji
model:
  preset: tiny
  hidden_size: 16
  num_heads: 2
  vision_layers: 2
  text_layers: 1
  alignment_layers: 1
  generation_layers: 1
  image_size: 16
  video_size: 16
  patch_size: 8
  text_length: 6
  projection_size: 8
  temporal_gain: 0.3
batch: {micro_batch_size_per_gpu: 2}
stages:
  - name: dense
    steps: 1
    data: [{source: emoji, kind: image_text}]
    objectives: [{kind: univlc, queue_size: 8}, vlm, lm]
    optimizer: {lr: 1e-3}
  - name: sparse
    init_from: dense
    steps: 1
    model:
      ffn: {kind: mome_limoe, pools: {image: 2, video: 1, text: 1}, common_experts: 2, every: 1, upcycle_noise: 0.1}
    data: [{source: emoji, kind: image_text}]
    objectives: [{kind: univlc, queue_size: 8}, vlm, mlm]
    optimizer: {lr: 1e-3}
  - name: adapted
    init_from: dense
    steps: 1
    lora: {rank: 2}
    data: [{source: emoji, kind: image_text}]
    objectives: [{kind: univlc, queue_size: 8}, vlm]
    optimizer: {lr: 1e-3}
"""
HOSTS = {
    "plain": "{host: plain, precision: fp32}",
    "zero1": "{host: zero, zero_stage: 1, precision: fp32}",
    "zero3": "{host: zero, zero_stage: 3, precision: fp32}",
    "zero1-ep2": "{host: zero, zero_stage: 1, expert_parallel_size: 2, precision: fp32}",
    "zero3-ep2": "{host: zero, zero_stage: 3, expert_parallel_size: 2, precision: fp32}",
    "pipe2": "{host: pipeline, pipeline_stages: 2, zero_stage: 1, precision: fp32}",
}
WHOLE = ("plain", "zero1")
CASES = [
    *((index, host) for index in (0, 2) for host in ("plain", "zero1", "zero3", "pipe2")),
    *((1, host) for host in ("plain", "zero3", "zero1-ep2", "zero3-ep2")),
]


def plan_of(host: str, processes: int, index: int) -> Plan:
    stage = ("dense", "sparse", "adapted")[index]
    return parse_plan(PLAN, "start.yaml", [f"stages.{stage}.parallel={HOSTS[host]}"], processes)


def start(plan: Plan, index: int, folder: Path, *, resumes: bool = False) -> tuple[Chain, bool]:
    """The chain, and whether torch's generator has drawn."""
    run, tokenizer = RunFolder(folder), load_tokenizer(plan.tokenizer)
    gather = make_gather(replica_group(plan.stages[index].parallel))
    device, progress = torch.device("cpu"), SilentProgress()
    chain, _ = start_chain(plan, index, run, tokenizer, gather, device, progress, resumes=resumes)
    after = torch.get_rng_state()
    seed_everything(plan.seed, "weights", index)
    return chain, not torch.equal(after, torch.get_rng_state())


def tables_of(chain: Chain) -> list[Tensor]:
    """Which experts a modality may go to, of each router: in no checkpoint."""
    tables = (module.allowed_ME for module in chain.modules() if isinstance(module, Router))
    return [table for table in tables if table is not None]


def values(folder: str) -> list[dict[str, Any]]:
    """Worker: what a process has, and all of them together, after the start of each case."""
    found = []
    for index, name in CASES:
        plan = plan_of(name, 2, index)
        stage = plan.stages[index]
        chain, drew = start(plan, index, Path(folder))
        freeze_idle(chain, stage.layouts())
        host = create_host(
            stage.parallel,
            chain,
            stage.optimizer,
            stage.objectives,
            total_steps=1,
            micro_batch_size=2,
            device=torch.device("cpu"),
            division=divide_stage(chain, stage),
        )
        own = {key: one.clone() for key, one in host.chain.state_dict().items()} if name in WHOLE else {}
        allowed = tables_of(chain)
        whole = host.full_weights()
        found.append({"drew": drew, "own": own, "whole": None if whole is None else dict(whole), "allowed": allowed})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is done."""
    folder = tmp_path_factory.mktemp("start") / "run"
    plan = plan_of("plain", 1, 0)
    torch.manual_seed(1)
    dense, tokens = plan.stages[0], load_tokenizer(plan.tokenizer).special
    weights = RunFolder(folder).stage(0, "dense").weights
    weights.parent.mkdir(parents=True)
    save_file(dict(build_chain(dense.model, dense.objectives, tokens).state_dict()), weights)
    return folder


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: object) -> None:
    assert found.keys() == wanted.keys(), what
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), (what, name)


@pytest.mark.timeout(300)
def test_values_of_process_0_are_everyone_s_and_those_of_a_single_process(run_distributed: Any, folder: Path) -> None:
    first, second = run_distributed(values, processes=2, limit=250, folder=str(folder))
    for case, one, other in zip(CASES, first, second, strict=True):
        chain, _ = start(plan_of("plain", 1, case[0]), case[0], folder)
        wanted = dict(chain.state_dict())
        assert one["drew"] and not other["drew"], case
        assert_same(one["whole"], wanted, case)
        if case[1] in WHOLE:
            assert_same(other["own"], wanted, case)
        allowed = tables_of(chain)
        assert bool(allowed) == (case[0] == 1)
        assert all(torch.equal(own, table) for own, table in zip(other["allowed"], allowed, strict=True))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_stage_that_resumes_draws_and_reads_nothing(
    index: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("plain", 1, index)
    assert ranks.rank() == 0
    usual, drew = start(plan, index, folder)
    assert drew
    monkeypatch.setattr("engine.disk.weights_file.WeightsFile.read", None)
    bare, drew = start(plan, index, folder, resumes=True)
    assert not drew
    assert not any(tensor.any() for name, tensor in bare.state_dict().items())
    bare.load_state_dict(usual.state_dict())
    for (name, own), (_, other) in zip(bare.named_parameters(), usual.named_parameters(), strict=True):
        assert (own.requires_grad, vars(own)) == (other.requires_grad, vars(other)), name
    assert_same(dict(bare.named_buffers()), dict(usual.named_buffers()), index)
