"""TCL: ALBEF's architecture with two views of each picture and parts of the momentum model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_towers import TOKENS, scattered

from omnivl.architectures import ALBEF, OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.objectives import MLM, VLM, IntraModal, LocalMI, PrepareContext, UniVLC
from omnivl.parts.losses import Losses
from omnivl.parts.sizes import Transformer

OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=8, batch_keys="momentum", soft_target_alpha=0.4),
    IntraModal(queue_size=8),
    LocalMI(pool=2),
    VLM(),
    MLM(probability=0.5, soft_target_alpha=0.4),
)
WIDE = Transformer(hidden_size=16, num_heads=2, layers=2)
SMALL = ALBEF(
    **{"vision": WIDE, "text": replace(WIDE, norm="post"), "fusion": replace(WIDE, norm="post")},
    **{"image_size": 16, "patch_size": 8, "text_length": 7, "vocab_size": 50, "projection_size": 8},
)
TOWERS = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 2, "text_layers": 2, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 0, "image_size": 16, "patch_size": 8, "text_length": 7},
    vocab_size=50,
)


def with_second_view(objectives):
    random = torch.Generator().manual_seed(7)
    frames, second = torch.randint(0, 256, (2, 4, 1, 3, 16, 16), generator=random, dtype=torch.uint8)
    token_ids = torch.randint(5, 50, (4, 7), generator=random)
    token_ids[:, 0], token_ids[:, 4], token_ids[:, 5:] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    batch = Batch("image_text", frames, token_ids, *torch.arange(12).view(3, 4), second_view=second)
    context = PrepareContext(0, "test", TOKENS, SMALL.inputs.grid(False), 0)
    prepared = {name: tensor for one in objectives for name, tensor in one.prepare(batch, context).items()}
    return replace(batch, prepared=prepared)


@pytest.mark.parametrize("model", [SMALL, TOWERS], ids=lambda model: model.kind)
def test_twins_see_the_second_view_and_give_its_parts(model):
    torch.manual_seed(0)
    objectives = OBJECTIVES[1:3]
    chain = scattered(build_chain(model, objectives, TOKENS))
    chain.copy_to_twins()
    batch, layout = with_second_view(objectives), plan_layout(objectives, "image_text", 4, 1)

    def read(batch):
        state = State.from_batch(batch, layout)
        for layer in chain.program:
            state = state if isinstance(layer, Losses) else layer(state)
        return state

    state, swapped = read(batch), read(replace(batch, frames=batch.second_view, second_view=None))
    torch.testing.assert_close(state["momentum_visual_embedding"], swapped["visual_embedding"])
    assert not torch.allclose(state["visual_embedding"], swapped["visual_embedding"], atol=1e-2)
    alone = read(replace(batch, second_view=None))
    torch.testing.assert_close(alone["momentum_visual_embedding"], alone["visual_embedding"])
    # Parts: every position behind the first, by the projection that the embedding has.
    for stream, positions in (("visual", 4), ("text", 6)):
        parts = state[f"momentum_{stream}_parts"]
        assert parts.shape == (4, positions, 8)
        assert not parts.requires_grad
        torch.testing.assert_close(parts.norm(dim=-1), torch.ones(4, positions))
    features = chain.features(batch.second_view)[:, 1:]
    wanted = F.normalize(chain.contrast.visual_projection(features), dim=-1)
    torch.testing.assert_close(state["momentum_visual_parts"], wanted)
    assert torch.equal(state["text_mask/clean"], batch.token_ids != TOKENS.pad)


def test_idle_parameters_are_those_without_a_gradient():
    for objectives in (OBJECTIVES, OBJECTIVES[1:2], OBJECTIVES[2:3]):
        torch.manual_seed(0)
        chain = build_chain(SMALL, objectives, TOKENS)
        layout = plan_layout(objectives, "image_text", 4, 1)
        out = chain(State.from_batch(with_second_view(objectives), layout))
        assert out.named("loss").keys() == {objective.key for objective in objectives}
        out["loss"].backward()
        idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
        for name, parameter in chain.named_parameters():
            assert (parameter.grad is None) == (id(parameter) in idle or not parameter.requires_grad), name


def test_losses_fall():
    torch.manual_seed(0)
    objectives = (UniVLC(batch_keys="momentum"), IntraModal(), LocalMI(pool=2))
    chain = build_chain(SMALL, objectives, TOKENS)
    optimizer = torch.optim.Adam([p for p in chain.parameters() if p.requires_grad], lr=3e-3)
    state = State.from_batch(with_second_view(objectives), plan_layout(objectives, "image_text", 4, 1))
    runs = []
    for _ in range(60):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        chain.after_step()
        runs.append({name: loss.item() for name, loss in out.named("loss").items()})
    for name, first in runs[0].items():
        assert runs[-1][name] < 0.8 * first, name
