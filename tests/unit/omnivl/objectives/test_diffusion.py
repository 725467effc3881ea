"""Drawing: loss and gradients by hand, the way from noise to picture, guidance, kept parts, latents of a tokenizer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_clip import TOKENS

from engine.step.freeze import freeze, freeze_idle
from omnivl.architectures import CLIP
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.names import stack_of
from omnivl.chain.objective import Heads, Objective, PrepareContext
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.sizes import InputSizes, PictureSizes
from omnivl.errors import UserError
from omnivl.inference.draw import draw, noise_shape, starting_noise
from omnivl.objectives.diffusion import Diffusion, DiffusionHead
from omnivl.objectives.quantize import Quantize, QuantizeHead
from omnivl.objectives.univlc import UniVLC
from omnivl.parts import attention
from omnivl.parts.denoiser import DenoiserSizes
from omnivl.parts.embed import pixel_values
from omnivl.parts.quantize import LookupFree, VectorQuantizer

MODEL = replace(CLIP.presets["tiny"], vocab_size=50, text_length=8, image_size=16, patch_size=8, projection_size=6)
SIZES = DenoiserSizes(hidden_size=16, num_heads=2, layers=3)
PIXELS = Diffusion(denoiser=SIZES, steps=4)
TOKENIZER = Quantize(width=2, quantizer=VectorQuantizer(num_codes=7, size=3), learns=False)
LATENTS = replace(PIXELS, latents="quantize", latent_size=3)
BY_EMBEDDING = replace(PIXELS, given="embedding")


def chain_of(*objectives: Objective) -> Chain:
    torch.manual_seed(0)
    chain = build_chain(MODEL, objectives, TOKENS)
    for name, parameter in chain.named_parameters():
        if name.endswith("outer.weight"):  # a denoiser's starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
    return chain


def batch(objective: Objective, positions: tuple[int, ...] = (3, 5, 8)) -> Batch:
    random = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (9, 1, 3, 16, 16), generator=random, dtype=torch.uint8)[list(positions)]
    ids = torch.tensor([[1, 7, 8, 49, 0, 0, 0, 0]]).repeat(len(positions), 1)
    own = torch.tensor(positions)
    made = Batch("image_text", frames, ids + own[:, None] * (ids == 7), own, own, own)
    return replace(made, prepared=objective.prepare(made, PrepareContext(0, "x", TOKENS, (2, 2), 0)))


def state_of(chain: Chain, objective: Objective, given: Batch) -> State:
    """The state before the losses."""
    state = State.from_batch(given, plan_layout(tuple(chain.objectives.values()), "image_text", given.size, 1))
    for layer in chain.program[:-1]:
        state = layer(state)
    return state


def test_draws_of_a_sample_follow_from_its_position_alone() -> None:
    whole, one = batch(PIXELS), batch(PIXELS, (5,))
    assert whole.prepared["diffusion/noise"].shape == (3, 4, 192)
    for name in ("times", "left_out", "noise"):
        assert torch.equal(whole.prepared[f"diffusion/{name}"][1], one.prepared[f"diffusion/{name}"][0])
    many = batch(replace(PIXELS, left_out=0.25, time_mean=1.0, time_deviation=0.5), tuple(range(9)) * 200)
    assert len(many.prepared["diffusion/times"].unique()) == 9
    many = replace(many, position=torch.arange(4000), frames=many.frames[:1].expand(4000, -1, -1, -1, -1))
    drawn = replace(PIXELS, left_out=0.25, time_mean=1.0, time_deviation=0.5).prepare(
        many, PrepareContext(0, "x", TOKENS, (2, 2), 0)
    )
    logits = torch.logit(drawn["diffusion/times"])
    assert logits.mean() == pytest.approx(1.0, abs=0.05) and logits.std() == pytest.approx(0.5, abs=0.03)
    assert drawn["diffusion/left_out"].float().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("target", ["velocity", "picture"])
def test_the_loss_by_hand(target) -> None:
    objective = replace(PIXELS, target=target)
    chain, given = chain_of(objective), batch(objective)
    given.prepared["diffusion/times"][0] = 0.99  # where the rest of the way would explode
    state, head = state_of(chain, objective, given), chain.losses.heads["diffusion"]
    made = objective.loss(state, Heads(head), LocalGather())
    total, pictures = 0.0, 0.0
    for row in range(3):
        picture = pixel_values(given.frames[row : row + 1], 8, torch.float32)[0, 0]
        noise, time = given.prepared["diffusion/noise"][row], given.prepared["diffusion/times"][row]
        mixed = time * picture + (1 - time) * noise
        raw = head.denoiser(
            mixed[None],
            time[None],
            state.rows("text", "clean")[row : row + 1],
            state["token_ids"][row : row + 1] != 0,
            given.prepared["diffusion/left_out"][row : row + 1],
        )[0]
        rest = max(1 - time, 0.05)
        velocity = raw if target == "velocity" else (raw - mixed) / rest
        total += (velocity - (picture - mixed) / rest).square().mean() / 3
        pictures += (mixed + rest * velocity - picture).square().mean() / 3
        if time < 0.95:
            torch.testing.assert_close((picture - mixed) / rest, picture - noise)
    torch.testing.assert_close(made.loss, total)
    torch.testing.assert_close(made.metrics["picture"], pictures.detach())


def test_every_weight_learns_and_so_do_the_words() -> None:
    chain, given = chain_of(PIXELS), batch(replace(PIXELS, left_out=0.5), tuple(range(8)))
    assert 0 < given.prepared["diffusion/left_out"].sum() < 8
    state = state_of(chain, PIXELS, given)
    chain.losses(state)["loss"].backward()
    head = chain.losses.heads["diffusion"]
    assert all(weight.grad is not None and weight.grad.any() for weight in head.parameters())
    assert chain.get_submodule("text_00").get_parameter("block.attention.qkv.weight").grad.any()
    assert all(weight.grad is None for weight in chain.get_submodule("visual_00").parameters())


def test_no_gradient_goes_back_to_the_embedding() -> None:
    chain, given = chain_of(BY_EMBEDDING), batch(BY_EMBEDDING)
    state = state_of(chain, BY_EMBEDDING, given)
    assert state["visual_embedding"].requires_grad
    chain.losses(state)["loss"].backward()
    assert all(weight.grad is None for name, weight in chain.named_parameters() if not name.startswith("losses"))
    assert all(weight.grad is not None for weight in chain.losses.heads["diffusion"].parameters())


class Oracle(torch.nn.Module):
    """Knows the pictures: gives what the denoiser should; without a condition those of another world."""

    def __init__(self, pictures: torch.Tensor, noise: torch.Tensor, target: str) -> None:
        super().__init__()
        self.pictures, self.noise, self.target = pictures, noise, target

    def forward(self, mixed, times, condition, mask, left_out):  # type: ignore[no-untyped-def]
        times_over = len(mixed) // len(self.pictures)
        pictures, noise = self.pictures.repeat(times_over, 1, 1), self.noise.repeat(times_over, 1, 1)
        shown = torch.where(left_out[:, None, None], pictures - 1.0, pictures)
        return shown if self.target == "picture" else shown - noise


@pytest.mark.parametrize("target", ["velocity", "picture"])
def test_along_the_right_velocity_noise_becomes_the_picture(target) -> None:
    objective = replace(PIXELS, target=target, steps=5, guidance=1.0)
    chain = chain_of(objective)
    random = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (3, 1, 3, 16, 16), generator=random, dtype=torch.uint8)
    noise = starting_noise(range(3), noise_shape(chain, "diffusion"), 0)
    head = chain.losses.heads["diffusion"]
    assert isinstance(head, DiffusionHead)
    head.denoiser = Oracle(pixel_values(frames, 8, torch.float32)[:, 0], noise, target)
    ids = torch.tensor([[1, 7, 49, 0, 0, 0, 0, 0]]).repeat(3, 1)
    with torch.no_grad():
        assert torch.equal(draw(chain.eval(), "diffusion", ids, noise), frames[:, 0])


def test_guidance_goes_beyond_the_condition() -> None:
    """The velocity with the condition is 1 above that without it, at each of the way's places: 1 for all of the way."""
    chain = chain_of(PIXELS)
    pictures, noise = torch.zeros(2, 4, 192), starting_noise(range(2), (4, 192), 0)
    head = chain.losses.heads["diffusion"]
    head.denoiser = Oracle(pictures, noise, "velocity")
    told, mask = torch.zeros(2, 1, 16), torch.ones(2, 1, dtype=torch.bool)
    for guidance, wanted in ((0.0, -1.0), (1.0, 0.0), (3.0, 2.0)):
        drawn = head.draw(told, mask, noise, 4, guidance)
        torch.testing.assert_close(drawn, torch.full_like(drawn, wanted))


@pytest.mark.parametrize("objectives", [(PIXELS,), (LATENTS, TOKENIZER)], ids=["pixels", "latents"])
def test_kept_parts_stay_and_others_are_drawn(objectives) -> None:
    chain = chain_of(*objectives).eval()
    given = batch(objectives[0])
    noise = starting_noise((0, 1, 2), noise_shape(chain, "diffusion"), 0)
    kept = torch.tensor([[True, False, True, True]]).repeat(3, 1)
    with torch.no_grad():
        drawn = draw(chain, "diffusion", given.token_ids, noise, given.frames, kept)
        free = draw(chain, "diffusion", given.token_ids, noise)
        every = draw(chain, "diffusion", given.token_ids, noise, given.frames, torch.ones_like(kept))
    assert drawn.shape == (3, 3, 16, 16) and drawn.dtype == torch.uint8
    assert not torch.equal(drawn, free)
    if objectives == (PIXELS,):
        assert torch.equal(every, given.frames[:, 0])
        assert torch.equal(drawn[:, :, 8:], given.frames[:, 0, :, 8:]) and torch.equal(
            drawn[:, :, :8, :8], given.frames[:, 0, :, :8, :8]
        )
        assert (drawn[:, :, :8, 8:] != given.frames[:, 0, :, :8, 8:]).any()
    else:
        tokenizer = chain.losses.heads["quantize"]
        assert isinstance(tokenizer, QuantizeHead)
        state = state_of(chain, LATENTS, given)
        vectors = tokenizer.vectors(state.rows("visual", "clean")[:, 1:])
        pixels = tokenizer.restored(tokenizer.nearest(vectors), (16, 16), torch.float32)
        assert torch.equal(every, ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_latents_are_the_tokenizers_vectors_with_mean_zero_and_deviation_one() -> None:
    chain, given = chain_of(LATENTS, TOKENIZER), batch(LATENTS)
    head, tokenizer = chain.losses.heads["diffusion"], chain.losses.heads["quantize"]
    state = state_of(chain, LATENTS, given)
    vectors = tokenizer.vectors(state.rows("visual", "clean")[:, 1:]).detach()
    assert torch.equal(head.scaled(vectors), vectors), "before the first step nothing is known"
    head.after_step(LocalGather())
    flat = vectors.flatten(0, 1)
    wanted = (vectors - flat.mean(0)) / flat.std(0, unbiased=False)
    with torch.no_grad():
        torch.testing.assert_close(head.scaled(vectors), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(head.unscaled(head.scaled(vectors)), vectors)
    assert not head.outbox, "without a gradient nothing is counted"
    chain.losses(state)["loss"].backward()
    assert all(weight.grad is None for weight in tokenizer.parameters()), "the tokenizer is as it was"
    assert all(weight.grad is None for weight in chain.get_submodule("visual_00").parameters())


def test_what_the_decoder_restores_is_what_was_quantized() -> None:
    for quantizer in (VectorQuantizer(num_codes=7, size=3), LookupFree(size=3)):
        head = chain_of(replace(TOKENIZER, quantizer=quantizer)).losses.heads["quantize"]
        patches = torch.randn(2, 4, MODEL.vision.hidden_size)
        whole, codes, _ = head.eval()(patches, (16, 16), LocalGather())
        torch.testing.assert_close(head.restored(head.nearest(head.vectors(patches)), (16, 16), torch.float32), whole)
        assert torch.equal(head.quantizer.codes(head.quantizer.vectors_of(codes)), codes)


@pytest.mark.parametrize("objectives", [(PIXELS,), (BY_EMBEDDING,)], ids=["text", "embedding"])
def test_operations_are_what_torch_counts(monkeypatch, objectives) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(attention, "prefers_products", lambda x: True)
    chain = chain_of(*objectives)
    given, layout = batch(objectives[0]), plan_layout(objectives, "image_text", 3, 1)
    given = replace(given, token_ids=given.token_ids.masked_fill(given.token_ids == 0, 9))
    head, state = chain.losses.heads["diffusion"], state_of(chain, objectives[0], given)
    apart = State({name: one.detach().requires_grad_(one.is_floating_point()) for name, one in state.items()}, layout)
    for name in given.prepared:
        apart[name] = given.prepared[name]
    with FlopCounterMode(display=False) as counter:
        chain.losses(apart)["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(head.flops(layout, chain.losses.backward), rel=1e-6)
    assert chain_flops(chain, layout) > head.flops(layout, chain.losses.backward)


@pytest.mark.parametrize(
    ("others", "got"),
    [
        ((TOKENIZER,), []),
        ((), ["'quantize'"]),
        ((replace(TOKENIZER, learns=True),), ["'quantize', which still learns, so that its vectors change"]),
        ((replace(TOKENIZER, quantizer=VectorQuantizer(num_codes=7, size=5)),), ["3"]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(others, got) -> None:
    by_key = {one.key: one for one in (LATENTS, *others)}
    assert [misfit.got for misfit in LATENTS.misfits_beside(by_key)] == got
    assert not list(PIXELS.misfits_beside(by_key))


def test_sizes_that_it_cannot_draw_are_refused() -> None:
    sizes = {"image_size": 56, "video_size": 56, "patch_size": 8, "num_frames": 1, "tubelet_size": 1, "native": True}
    found = replace(PIXELS, denoiser=DenoiserSizes(16, 3)).misfits(InputSizes.of(PictureSizes(**sizes), 6), 4)
    assert [misfit.got for misfit in found] == ["'diffusion' with sizes 'native'", "3"]


def test_only_objectives_that_draw_are_asked_to() -> None:
    with pytest.raises(UserError, match="got the objective 'quantize'; allowed are those of the stage that draw"):
        noise_shape(chain_of(LATENTS, TOKENIZER), "quantize")


def test_a_head_that_does_not_learn_is_as_it_was() -> None:
    objectives = (LATENTS, TOKENIZER)
    chain = chain_of(*objectives)
    assert plan_layout(objectives, "image_text", 3, 1).objectives == ("diffusion",)
    idle = {id(one) for one in chain.losses.idle_parameters([plan_layout(objectives, "image_text", 3, 1)])}
    assert {id(one) for one in chain.losses.heads["quantize"].parameters()} <= idle
    before = {name: one.clone() for name, one in chain.losses.heads["quantize"].state_dict().items()}
    chain(State.from_batch(batch(LATENTS), plan_layout(objectives, "image_text", 3, 1)))["loss"].backward()
    chain.after_step()
    after = chain.losses.heads["quantize"].state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert F.mse_loss(chain.losses.heads["diffusion"].sums[0], torch.full((3,), 12.0)) == 0


def test_what_is_read_without_a_gradient_is_frozen() -> None:
    """Else the optimizer would decay it."""
    learns = {
        (PIXELS,): "text",
        (LATENTS, TOKENIZER): "text",
        (BY_EMBEDDING,): "",
        (BY_EMBEDDING, UniVLC()): "visual text",
    }
    for objectives, stacks in learns.items():
        chain = chain_of(*objectives)
        freeze(chain, (), "stages.0.freeze")
        freeze_idle(chain, [plan_layout(objectives, "image_text", 3, 1)])
        trained = {stack_of(name) for name, one in chain.named_parameters() if one.requires_grad}
        assert trained & {"visual", "text"} == set(stacks.split()), objectives
        assert "losses" in trained
