"""A language model behind queries in every layout, trained, or frozen in bf16: results agree with one process."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import real_chain as real
import torch
from small_language import TOKENS, LetterTokenizer, Writer
from test_layouts import ACCUMULATION, JOINED, STEPS, TOLERANCES, Model, assert_equal_runs, make_host

from engine.disk.weights_file import WeightsFile
from engine.disk.weights_out import write_weights
from engine.hosts.pipeline.cut import layer_costs
from engine.step.freeze import freeze, freeze_idle, store_frozen
from omnivl.architectures.build import Settle, build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.data.batch import Batch
from omnivl.data.collate import Collator
from omnivl.data.tokenizer import load_readers
from omnivl.objectives import Objective, PrefixLM

OBJECTIVES: tuple[Objective, ...] = (PrefixLM(),)
SMALL = Writer()
HALVED = replace(SMALL.language, blocks=replace(SMALL.language.blocks, frozen_dtype="bf16"))
CONFIGS = {"trained": SMALL, "frozen": replace(SMALL, language=HALVED)}
KINDS = ("image_text", "text")


class Writing(Model):
    """The small chain, and batches of pairs and, where the language model is trained, of texts alone."""

    def __init__(self, name: str) -> None:
        self.frozen = name != "trained"
        self.config = CONFIGS["frozen" if self.frozen else "trained"]
        self.dtype = torch.bfloat16 if name == "frozen-bf16" else torch.float32
        self.plan_layout = partial(plan_layout, OBJECTIVES)

    def build(self, gather: Gather, settle: Settle | None = None, seed: int = 0) -> Chain:
        torch.manual_seed(seed)
        chain = build_chain(self.config, OBJECTIVES, TOKENS, gather=gather, settle=settle, compute_dtype=self.dtype)
        if self.frozen:
            freeze(chain, ["language_*"], "freeze")
        freeze_idle(chain, self.layouts())
        store_frozen(chain, self.config.stacks)
        return chain

    def layouts(self) -> list[Any]:
        return [self.plan_layout(kind, JOINED, 1) for kind in self._kinds]

    @property
    def _kinds(self) -> tuple[Any, ...]:
        return KINDS[:1] if self.frozen else KINDS

    def costs(self, chain: Chain) -> dict[Any, float]:
        return layer_costs(chain, self.layouts())

    def batches(self, step: int, gather: Gather) -> list[Batch]:
        own = JOINED // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        readers = load_readers(SMALL.text_inputs, LetterTokenizer())
        prepare = Preparation(OBJECTIVES, TOKENS, SMALL.inputs, 0, readers)
        collator = Collator(SMALL.inputs, LetterTokenizer(), prepare)
        found = []
        for index in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            kind = self._kinds[index % len(self._kinds)]
            examples = real.examples(index, JOINED, video=False)[share]
            if kind == "text":
                examples = [replace(one, pictures=None) for one in examples]
            found.append(collator.collate(examples, kind, "letters", step))
        return found


def types_of(chain: Chain) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in chain.named_parameters()}


def train_writer(hosts: list[str], name: str, folder: str) -> dict[str, dict[str, Any]]:
    """Worker: trains each host in turn from equal weights; half-way it saves, and loads into one of other weights."""
    report = {}
    for number, host_name in enumerate(hosts):
        model, place = Writing(name), Path(folder) / f"{name}-{number}-{host_name}"
        host = make_host(host_name, model)
        results = []
        for step in range(STEPS):
            if step == STEPS // 2:
                host.save(place / "host")
                host = make_host(host_name, model, seed=1)
                host.load(place / "host")
            results.append(host.step(model.batches(step, host.gather), step))
        write_weights(host, place / "weights.safetensors", None)
        report[host_name] = {"results": results, "weights": host.full_weights(), "types": types_of(host.chain)}
        stored = WeightsFile(place / "weights.safetensors")
        report[host_name]["stored"] = stored.read(stored.names)
    return report


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["trained", "frozen", "frozen-bf16"])
def test_hosts_agree(run_distributed: Any, tmp_path: Path, name: str) -> None:
    low = name == "frozen-bf16"
    hosts = ["plain", "zero3", "pipe2-zero1", *(() if low else ("zero1", "zero3-built", "zero3-offload_all"))]
    expected = train_writer(["plain"], name, str(tmp_path / "one"))["plain"]
    assert "prefix_lm" in expected["results"][0].losses
    given = {"hosts": hosts, "name": name, "folder": str(tmp_path / "two")}
    ranks = run_distributed(train_writer, processes=2, limit=300, **given)
    halved = {key for key, tensor in expected["stored"].items() if tensor.dtype == torch.bfloat16}
    if name == "trained":
        assert halved == set()
    else:
        assert {"language_embed.block.words", "language_00.block.attention.qkv.weight"} <= halved
        assert all(key.startswith("language_") for key in halved)
    for host in hosts:
        assert_equal_runs(ranks[0][host], expected, TOLERANCES["bf16" if low else "real"])
        assert ranks[1][host]["results"] == ranks[0][host]["results"]
        assert ranks[0][host]["types"] == expected["types"]
        for key, tensor in expected["stored"].items():
            stored = ranks[0][host]["stored"][key]
            assert stored.dtype == tensor.dtype
            if key in halved:
                assert torch.equal(stored, tensor)
