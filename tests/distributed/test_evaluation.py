"""Evaluation over replicas, of whole and of sharded chains, equals evaluation on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from worker import RunDistributed

from engine.hosts import create_host, replica_group
from engine.hosts.pipeline.cut import cut
from engine.hosts.pipeline.division import divide_chain
from engine.plan.parallel import ParallelConfig
from engine.processes.collectives import make_gather
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import load_tokenizer
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import LM, VLM, UniVLC
from omnivl.tasks import CaptionTask, RetrievalTask, ZeroShotTask
from omnivl.tasks.run import run_tasks

pytestmark = pytest.mark.distributed

WHERE = {"style": ("twemoji",), "label": ("bugs", "fruit")}
OBJECTIVES = (UniVLC(), VLM(), LM())


def evaluated(host: str, zero_stage: int) -> dict[str, Any]:
    """Scores and embeddings of a chain with fresh weights, under some host."""
    tokenizer = load_tokenizer("emoji")
    model = replace(
        OmniVL.presets["tiny"],
        **{"hidden_size": 32, "num_heads": 2, "vision_layers": 2, "text_layers": 1, "alignment_layers": 1},
        **{"generation_layers": 1, "image_size": 32, "projection_size": 16, "text_length": 12},
        vocab_size=tokenizer.special.vocab_size,
    )
    torch.manual_seed(1)
    parallel = ParallelConfig(host=host, zero_stage=zero_stage, precision="fp32")  # type: ignore[arg-type]
    gather = make_gather(replica_group(parallel))
    chain = build_chain(model, OBJECTIVES, tokenizer.special, gather=gather)
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # near ties would hang on the order of additions
    division = divide_chain(chain, cut([1.0] * len(chain.passes), 2))
    held = create_host(
        parallel,
        chain,
        OptimizerConfig(),
        OBJECTIVES,
        total_steps=1,
        micro_batch_size=2,
        division=division,
    )
    tasks = [
        RetrievalTask(where=WHERE, rerank=4),
        ZeroShotTask(where=WHERE, prompts=("{label}", "a {label}")),
        CaptionTask(where=WHERE, num_beams=2, max_samples=5),
    ]
    with held.whole_chain() as whole:
        encoder = Encoder(whole, model, tokenizer, make_gather(), held.device, batch_size=8)
        results = run_tasks(tasks, encoder)
        held.chain.eval()
        pictures = PictureSet("emoji", "image", WHERE, model.inputs, 4096)
        return {
            "scores": [(score.metric, score.value, score.count) for result in results for score in result.scores],
            "written": [one.given for result in results for gallery in result.galleries for one in gallery.examples],
            "pictures": encoder.pictures(pictures),
            "texts": encoder.texts(pictures.captions),
        }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return evaluated("plain", 0)


@pytest.mark.parametrize(("host", "zero_stage"), [("plain", 0), ("zero", 3), ("pipeline", 1)])
def test_two_processes_find_what_one_finds(
    run_distributed: RunDistributed, alone: dict[str, Any], host: str, zero_stage: int
) -> None:
    """35 pictures: the processes' shares are 18 and 17 and a repetition that must not count."""
    assert alone["scores"][0][2] == 35
    values = [value for _, value, _ in alone["scores"]]
    assert len(set(values)) > 4, "the chain tells pictures apart, so that equal scores mean something"
    for replica in run_distributed(evaluated, processes=2, host=host, zero_stage=zero_stage):
        assert replica["scores"] == alone["scores"]
        assert replica["written"] == alone["written"]
        torch.testing.assert_close(replica["pictures"], alone["pictures"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(replica["texts"], alone["texts"], rtol=1e-4, atol=1e-5)
