"""Contrast of a whole step: what is embedded twice is embedded equally, and only a micro-batch is kept at a time."""

from dataclasses import replace
from functools import partial

import pytest
import real_chain as real
import torch

from engine.hosts.contrast import Draws, StepContrast
from engine.hosts.micro_batch import first_states
from engine.hosts.plain import PlainHost
from engine.step.optimizer import OptimizerConfig
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import EMBEDDING_STACK
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.objectives import LM, MLM, VLM, IntraModal, Objective, UniVLC

OBJECTIVES: tuple[Objective, ...] = (UniVLC(queue_size=16, batch_keys="momentum"), VLM(), MLM(), LM())
LAYOUT = partial(plan_layout, OBJECTIVES)


def chain_and_states(accumulation: int = 3):
    torch.manual_seed(0)
    config = real.CONFIG
    config = type(config)(**{**vars(config), "drop_path": 0.5})
    chain = build_chain(config, OBJECTIVES, real.TOKENS, gather=LocalGather()).train()
    batches = real.step_batches(0, accumulation, 4, LocalGather(), OBJECTIVES, of=("image_text",))
    return chain, batches, list(first_states(batches, LAYOUT, torch.device("cpu"), chain, LocalGather()))


def test_both_passes_draw_the_same_numbers_and_later_ones_go_on() -> None:
    chain, _, states = chain_and_states()
    seen: list[torch.Tensor] = []
    (project,) = [layer for layer in chain.program if layer.stack == EMBEDDING_STACK]
    project.register_forward_hook(lambda _, __, state: seen.append(state["visual_embedding"].detach().clone()))
    torch.manual_seed(5)
    contrast = StepContrast(chain)
    for state in contrast.twice(states, partial(chain, embeds=True), chain.discard_step):
        chain(state)["loss"].backward()
    first, second = seen[:3], seen[3:]
    assert len(second) == 3
    assert all(map(torch.equal, first, second))
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.randint(2**62, (3,))  # the seeds are all that a step draws
    assert torch.equal(after, torch.rand(1))
    chain(states[0])
    assert not torch.equal(seen[-1], first[0]), "the encoder draws something"


def test_micro_batches_have_numbers_of_their_own() -> None:
    torch.manual_seed(0)
    draws, found = Draws(2), []
    for place in (0, 1, 0):
        with draws.of(place):
            found.append(torch.rand(3))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_queue_gets_each_key_once() -> None:
    chain, batches, _ = chain_and_states()
    host = PlainHost(
        *(chain, OptimizerConfig(lr=1e-3), LAYOUT), total_steps=3, gradient_accumulation_steps=3, contrasts_step=True
    )
    result = host.step(batches, 0)
    queue = chain.losses.heads["univlc"].queue
    assert int(queue.keys().valid.sum()) == 12
    assert queue.keys().identity[queue.keys().valid].tolist() == torch.cat([one.identity for one in batches]).tolist()
    assert result.losses.keys() == {"univlc", "vlm", "mlm", "lm"}


def test_contrast_within_modalities_over_a_step_is_that_of_the_joined_batch() -> None:
    objectives = (UniVLC(queue_size=16, batch_keys="momentum"), IntraModal(queue_size=16))
    (whole,) = real.step_batches(0, 1, 8, LocalGather(), objectives, of=("image_text",))
    names, halves = ("frames", "token_ids", "identity", "label", "position"), (slice(0, 4), slice(4, 8))
    cut = [replace(whole, **{name: getattr(whole, name)[own] for name in names}) for own in halves]
    made = []
    for given in ([whole], cut):
        torch.manual_seed(0)
        chain = build_chain(real.CONFIG, objectives, real.TOKENS, gather=LocalGather())
        steps = {"gradient_accumulation_steps": len(given), "contrasts_step": len(given) > 1}
        optimizer = OptimizerConfig(lr=1e-3, eps=1e-3)
        host = PlainHost(chain, optimizer, partial(plan_layout, objectives), total_steps=3, **steps)  # type: ignore[arg-type]
        made.append((host.step(given, 0), host.full_weights()))
    (step, weights), (other, others) = made
    assert other.losses == pytest.approx(step.losses, rel=1e-5)
    assert other.losses.keys() == {"univlc", "intra_modal"}
    assert weights is not None and others is not None
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_is_kept_of_the_first_pass() -> None:
    chain, _, states = chain_and_states()
    contrast, kept = StepContrast(chain), []

    def embed(state: State) -> State:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            made = chain(state, embeds=True)
        assert "fused" not in made
        assert "loss" not in made
        return made

    next(contrast.twice(states, embed, chain.discard_step))
    assert not kept


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.kind)
def test_only_losses_of_embeddings_are_computed_over_a_step(objective: Objective) -> None:
    assert objective.compares_embeddings == (objective.kind == "univlc")
