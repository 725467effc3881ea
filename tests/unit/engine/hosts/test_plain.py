"""The plain host against a bare PyTorch loop over the same chain, and its guard, files and weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_chain as synthetic
import torch

from engine.errors import CheckpointError
from engine.hosts.plain import PlainHost
from engine.step.muon import MuonConfig
from engine.step.optimizer import OptimizerConfig
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State

CONFIG = OptimizerConfig(lr=1e-2, schedule="constant", weight_decay=0.1, gradient_clipping=0.5)
MUON = replace(CONFIG, kind="muon", muon=MuonConfig(lr=1e-2, weight_decay=0.1))
BOTH = pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])


def make_host(accumulation: int = 2, config: OptimizerConfig = CONFIG, seed: int = 0) -> PlainHost:
    return PlainHost(
        synthetic.build_synthetic_chain(seed=seed),
        config,
        synthetic.plan_layout,
        total_steps=10,
        gradient_accumulation_steps=accumulation,
    )


def train(host: PlainHost, steps: range) -> list[Any]:
    return [host.step(synthetic.step_batches(step, 2, 4, LocalGather()), step) for step in steps]


def weights_of(host: PlainHost) -> dict[str, torch.Tensor]:
    weights = host.full_weights()
    assert weights is not None
    return dict(weights)


def test_equals_a_bare_loop() -> None:
    host = make_host()
    results = train(host, range(5))

    chain = synthetic.build_synthetic_chain()
    plain = [p for n, p in chain.named_parameters() if p.requires_grad and not _decayed(n, p)]
    decayed = [p for n, p in chain.named_parameters() if p.requires_grad and _decayed(n, p)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], 1e-2
    )
    for step, result in enumerate(results):
        losses = []
        for parameter in chain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for batch in synthetic.step_batches(step, 2, 4, LocalGather()):
            layout = synthetic.plan_layout(batch.kind, batch.size, batch.num_frames)
            loss = chain(State.from_batch(batch, layout))["loss"]
            (loss / 2).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(chain.parameters(), 0.5)
        optimizer.step()
        chain.after_step()
        assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
        assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
        assert not result.skipped
    for name, tensor in chain.state_dict().items():
        torch.testing.assert_close(weights_of(host)[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def _decayed(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() > 1 and name not in ("embed.word_embedding.weight", "embed.position")


def test_losses_and_metrics_are_averaged_over_the_micro_batches_that_have_them() -> None:
    host = make_host(accumulation=2)
    captions = synthetic.joined_batch(0, 4, "image_text")
    labels = synthetic.joined_batch(1, 4, "image_label")
    alone = make_host(accumulation=1).step([captions], 0)
    both = host.step([captions, labels], 0)
    assert both.losses["lm"] == pytest.approx(alone.losses["lm"])  # label micro-batches have no such loss
    assert set(both.losses) == {"univlc", "lm"}
    assert set(both.metrics) == {"univlc/accuracy"}


@BOTH
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(poison: str, config: OptimizerConfig) -> None:
    host = make_host(config=config)
    train(host, range(2))
    before = weights_of(host)
    optimizer_before = {k: v.clone() for k, v in _moments(host).items()}
    if poison == "loss":
        handle = host.chain.layers[-1].register_forward_hook(
            lambda module, args, state: state.merged({"loss": state["loss"] + math.nan})
        )
    else:
        handle = next(p for p in host.chain.parameters() if p.requires_grad).register_hook(lambda g: g * math.inf)
    result = train(host, range(2, 3))[0]
    handle.remove()
    assert result.skipped
    assert (math.isnan(result.loss)) == (poison == "loss")
    for name, tensor in weights_of(host).items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in _moments(host).items():
        assert torch.equal(tensor, optimizer_before[name]), name

    # The queue's outbox was dropped too: what follows equals a run that never saw the step.
    after = train(host, range(3, 5))
    other = make_host(config=config)
    train(other, range(2))
    for got, expected in zip(after, train(other, range(3, 5)), strict=True):
        assert got.loss == expected.loss
    for name, tensor in weights_of(host).items():
        assert torch.equal(tensor, weights_of(other)[name]), name


def _moments(host: PlainHost) -> dict[str, torch.Tensor]:
    state = host._optimizer.state_dict()["state"]
    return {f"{index}/{key}": value for index, entry in state.items() for key, value in entry.items()}


@BOTH
def test_resumes_bit_for_bit(config: OptimizerConfig, tmp_path: Path) -> None:
    whole = make_host(config=config)
    train(whole, range(6))
    first = make_host(config=config)
    train(first, range(3))
    first.save(tmp_path)
    second = make_host(config=config, seed=1)
    second.load(tmp_path)
    train(second, range(3, 6))
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(second)[name]), name


def test_load_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        make_host().load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'index.json'}: not found; allowed is a folder that a host saved, an index with its shards"
    )


def test_load_weights_reports_and_refuses() -> None:
    source, target = make_host(seed=1), make_host(seed=2)
    weights = weights_of(source)
    report = target.load_weights(weights)
    assert len(report.matched) == len(weights)
    assert not report.missing
    assert not report.unexpected
    for name, tensor in weights_of(target).items():
        assert torch.equal(tensor, weights[name]), name

    del weights["losses.head.bias"]
    weights["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        target.load_weights(weights)
    assert str(error.value) == (
        "weights: missing losses.head.bias; unexpected stray; allowed are exactly the model's own names:"
        " load without strict to keep what is missing"
    )
    report = target.load_weights(weights, strict=False)
    assert report.missing == ("losses.head.bias",)
    assert report.unexpected == ("stray",)
    weights["losses.head.weight"] = torch.zeros(2, 3)
    with pytest.raises(CheckpointError) as error:
        target.load_weights(weights, strict=False)
    assert str(error.value) == (
        "weights: losses.head.weight has shape [2, 3], the model has [37, 10] (1 such weights);"
        " build the model with the sizes that the weights were trained with"
    )


def test_learning_rates_follow_the_schedule() -> None:
    config = OptimizerConfig(lr=1e-2, schedule="linear", warmup_steps=2, layer_decay=0.5)
    host = make_host(config=config)
    first, second = train(host, range(2))
    assert first.learning_rates["decay"] == pytest.approx(5e-3)
    assert second.learning_rates["decay"] == pytest.approx(1e-2)
    assert second.learning_rates["decay_x0.25"] == pytest.approx(2.5e-3)  # visual_00: 0.5 ** (2 - 0)
