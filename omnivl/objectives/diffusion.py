"""Drawing: pictures are made from noise, beside a text or an embedding, and parts of pictures anew.

Shapes: B samples, N = h * w parts of a picture (its patches), W width of a part, C positions of the condition, E their
width, P projection size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import Backward
from omnivl.chain.demands import CLEAN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss, PrepareContext
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout, part
from omnivl.data.batch import Batch, DataKind, has_text, is_pair, visual_of
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.objectives.quantize import Quantize, QuantizeHead
from omnivl.parts.denoiser import Denoiser, DenoiserSizes
from omnivl.parts.embed import pixel_values

_NEAR_THE_END = 0.05
"""Least part of the way that divides: Li and He, arXiv 2511.13720, appendix A."""
_ENOUGH = 1e5
"""Vectors from which the mean and deviation of latents are taken."""
_LEAST = 1e-9
_SEED = 0


@dataclass(frozen=True)
class Diffusion(Objective):
    """Draws a picture as a flow from noise to it, beside what the chain knows of the picture.

    A picture's parts are its patches: pixels from -1 to 1, or with ``latents`` the vectors of a picture tokenizer. In
    training the parts x are mixed with normal noise e at a time t, t x + (1 - t) e, and the velocity x - e is learnt.
    Drawing starts with noise at t = 0 and goes along the velocity to t = 1.

    Attributes:
        denoiser: Sizes of the transformer that predicts.
        given: The condition. ``text``: all positions of the text stream. ``embedding``: the picture's own contrastive
            embedding, from which no gradient goes back; a drawing is made from a text's embedding in its place, or
            from a picture's, of which it is a variation.
        latents: Key of an objective ``quantize`` of the stage, with ``learns: false``, whose encoder and decoder an
            earlier stage has trained. No gradient goes back to them. Null draws pixels.
        latent_size: With ``latents``, the quantizer's ``size``.
        target: What the transformer gives: the ``velocity``, or the ``picture`` x, from which the velocity follows.
            The latter learns pixels, of which a part has more than the transformer can tell noise from, far sooner.
        left_out: Share of samples whose condition is left out in training, so that drawings can be guided.
        guidance: g of drawings: the velocity is u + g (c - u), with the condition (c) and without it (u). 1 takes c.
        steps: Steps of equal length from noise to picture.
        time_mean: Mean of the normal variable whose sigmoid is t.
        time_deviation: Its deviation.

    Source: Liu et al., rectified flow, arXiv 2209.03003, equation 1; Esser et al., arXiv 2403.03206, section 3.1 (the
        logit-normal times); Rombach et al., latent diffusion, arXiv 2112.10752, section 3; guidance: Ho and Salimans,
        arXiv 2207.12598, equation 6; ``embedding``: Ramesh et al., DALL-E 2, arXiv 2204.06125, section 2.1;
        ``picture``: Li and He, arXiv 2511.13720, section 4.
    Differs: velocities instead of noise in latent diffusion and DALL-E 2, whose decoder draws pixels and reads the
        caption too, and whose prior, which makes a picture's embedding from a text's, is missing.
    """

    kind: Literal["diffusion"] = "diffusion"
    denoiser: DenoiserSizes = field(default_factory=DenoiserSizes)
    given: Literal["text", "embedding"] = "text"
    latents: str | None = None
    latent_size: Annotated[int, Range(1)] = 32
    target: Literal["velocity", "picture"] = "velocity"
    left_out: Annotated[float, Range(0.0, 1.0)] = 0.1
    guidance: Annotated[float, Range(0.0, 100.0)] = 3.0
    steps: Annotated[int, Range(1)] = 32
    time_mean: float = 0.0
    time_deviation: Annotated[float, Range(above=0.0)] = 1.0

    @property
    def borrows(self) -> tuple[str, ...]:
        """The tokenizer."""
        return () if self.latents is None else (self.latents,)

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Pictures of sizes of their own; heads that do not divide the width."""
        if inputs.native:
            yield Misfit(("kind",), f"{self.key!r} with sizes 'native'", "'fixed' or 'stretched'", "set model.sizes")
        width, heads = self.denoiser.hidden_size, self.denoiser.num_heads
        if width % heads:
            yield Misfit(("denoiser", "num_heads"), str(heads), f"a divisor of hidden_size {width}", "change either")

    def misfits_beside(self, others: Mapping[str, Objective]) -> Iterator[Misfit]:
        """A tokenizer that is missing, still learns, or has vectors of another width."""
        if self.latents is None:
            return
        tokenizer = others.get(self.latents)
        if not isinstance(tokenizer, Quantize):
            known = ", ".join(repr(key) for key, one in others.items() if isinstance(one, Quantize)) or "none"
            allowed = f"the key of an objective of kind 'quantize' of the stage: {known}"
            yield Misfit(("latents",), repr(self.latents), allowed, "add it, with learns: false")
        elif tokenizer.learns:
            got = f"{self.latents!r}, which still learns, so that its vectors change"
            yield Misfit(("latents",), got, "one with learns: false", f"set that of {self.latents!r}")
        elif tokenizer.quantizer.size != self.latent_size:
            allowed = f"{tokenizer.quantizer.size}, the size of {self.latents!r}'s quantizer"
            yield Misfit(("latent_size",), str(self.latent_size), allowed, "set it so")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The condition of images; with ``latents`` their patches."""
        if visual_of(kind) != "image" or (self.given == "text" and not is_pair(kind)):
            return None
        return self._reads("text" if self.given == "text" else "visual_embedding", with_picture=True)

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """Drawn is from texts alone; beside an image, of which parts may be kept; from an image, its variation."""
        if visual_of(kind) not in ("none", "image") or (self.given == "text" and not has_text(kind)):
            return None
        return self._reads(self._condition(kind), with_picture=visual_of(kind) == "image")

    def _condition(self, kind: DataKind) -> str:
        """The field that drawings of such samples are made from."""
        if self.given == "text":
            return "text"
        return "text_embedding" if has_text(kind) else "visual_embedding"

    def _reads(self, condition: str, *, with_picture: bool) -> Demands:
        patches = {"visual"} if with_picture and self.latents is not None else set()
        resting = patches if condition == "text" else {condition} | patches
        return Demands(reads=frozenset({condition} | patches), resting=frozenset(resting))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``{key}/times`` fp32 ``[B]``, ``{key}/left_out`` bool ``[B]``, ``{key}/noise`` fp32 ``[B, N, W]``."""
        assert batch.frames is not None
        once = torch.from_numpy(context.uniforms(self.key, batch, 2))
        normal = torch.special.ndtri(once[:, 0].clamp(_LEAST, 1.0 - _LEAST))
        width = self.latent_size if self.latents is not None else 3 * (batch.frames.shape[-2] // context.grid[0]) ** 2
        noise = np.empty((batch.size, context.places(batch), width), dtype=np.float32)
        streams = context.streams(f"{self.key}/noise")
        for own, position in zip(noise, batch.position.tolist(), strict=True):
            streams.at(position).standard_normal(out=own, dtype=np.float32)
        return {
            f"{self.key}/times": torch.sigmoid(self.time_mean + self.time_deviation * normal).float(),
            f"{self.key}/left_out": once[:, 1] < self.left_out,
            f"{self.key}/noise": torch.from_numpy(noise),
        }

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """The denoiser, and the scale of latents."""
        return DiffusionHead(self, sizes)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """The mean squared error of velocities. Metric: ``picture``, that of the parts that follow from them."""
        head = heads.own
        assert isinstance(head, DiffusionHead)
        parts, noise = head.scaled(self._parts(state, heads)), state[f"{self.key}/noise"]
        times, left_out = state[f"{self.key}/times"], state[f"{self.key}/left_out"]
        condition = "text" if self.given == "text" else "visual_embedding"
        mixed = times[:, None, None] * parts + (1.0 - times)[:, None, None] * noise
        found = head.velocities(mixed, times, *self._told(state, condition), left_out)
        wanted = (parts - mixed) / head.left(times)
        with torch.no_grad():
            picture = F.mse_loss(mixed + head.left(times) * found, parts)
        return ObjectiveLoss(F.mse_loss(found, wanted), {"picture": picture})

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Draws a picture for each text, or each image: uint8 ``[B, 3, H, W]``.

        The state may have ``{key}/noise`` fp32 ``[B, N, W]`` to start from, else it is drawn, the same at every call;
        and beside images ``{key}/kept`` bool ``[B, N]``, which patches of them are kept as they are.
        """
        head = heads.own
        assert isinstance(head, DiffusionHead)
        condition, mask = self._told(state, self._condition(state.layout.kind))
        noise = state.get(f"{self.key}/noise")
        if noise is None:
            noise = head.noise(len(condition), condition.device)
        kept = state.get(f"{self.key}/kept")
        known = None if kept is None else head.scaled(self._parts(state, heads))
        drawn = head.draw(condition, mask, noise, self.steps, self.guidance, kept, known)
        if self.latents is None:
            pixels = head.folded(drawn)
        else:
            tokenizer = heads.borrowed[self.latents]
            assert isinstance(tokenizer, QuantizeHead)
            pixels = tokenizer.restored(
                tokenizer.nearest(head.unscaled(drawn)), (head.side, head.side), condition.dtype
            )
        whole: Tensor = ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return whole

    def _parts(self, state: State, heads: Heads) -> Tensor:
        """The parts of the images, fp32 ``[B, N, W]``, no gradient."""
        if self.latents is None:
            assert isinstance(heads.own, DiffusionHead)
            return pixel_values(state["frames"], heads.own.patch_size, torch.float32)[:, 0]
        tokenizer = heads.borrowed[self.latents]
        assert isinstance(tokenizer, QuantizeHead)
        with torch.no_grad():
            return tokenizer.vectors(state.rows("visual", CLEAN)[:, 1:])

    def _told(self, state: State, condition: str) -> tuple[Tensor, Tensor]:
        """The condition ``[B, C, E]``, and which of its positions there are, bool ``[B, C]``."""
        if condition == "text":
            mask = state.get(f"text_mask/{CLEAN}")
            if mask is None:
                mask = part(state["text_mask"], state.layout.text[CLEAN])
            return state.rows("text", CLEAN), mask
        embedding = state[condition].detach()
        told = (embedding * embedding.shape[-1] ** 0.5)[:, None]
        return told, torch.ones(told.shape[:2], dtype=torch.bool, device=told.device)


class DiffusionHead(Head):
    """A denoiser of parts of pictures, and the mean and deviation of latents.

    The latter are those of the first vectors that training sees, of all replicas.
    """

    sums: Tensor

    def __init__(self, config: Diffusion, sizes: HeadSizes) -> None:
        super().__init__()
        self.patch_size, self.grid = sizes.patch_size, sizes.image_size // sizes.patch_size
        self.target, self.by_text = config.target, config.given == "text"
        self.positions = sizes.text_length if self.by_text else 1
        self.width = 3 * sizes.patch_size**2 if config.latents is None else config.latent_size
        told = sizes.widths["text"] if self.by_text else sizes.projection_size
        self.denoiser = Denoiser(config.denoiser, self.grid**2, self.width, told)
        self.outbox: list[Tensor] = []
        self.has_scale = config.latents is not None
        if self.has_scale:  # number of vectors, their sums, and the sums of their squares
            self.register_buffer("sums", torch.zeros(3, self.width))

    @property
    def side(self) -> int:
        """Of a picture in pixels."""
        return self.grid * self.patch_size

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of the denoiser, once for each sample."""
        drawn = self.denoiser.flops_of_noise()
        if not self.by_text:
            drawn += 2.0 * self.denoiser.condition.in_features * self.denoiser.condition.out_features
        return layout.batch_size * (backward.passes * self.denoiser.flops(self.positions) - backward.inputs * drawn)

    def noise(self, count: int, device: torch.device) -> Tensor:
        """Noise to start from, the same at every call, fp32 ``[count, N, W]``."""
        random = torch.Generator(device="cpu").manual_seed(_SEED)
        return torch.randn(count, self.grid**2, self.width, generator=random, device="cpu").to(device)

    def scaled(self, parts: Tensor) -> Tensor:
        """Parts ``[B, N, W]`` with mean 0 and deviation 1 where they are latents; in training these are counted."""
        if not self.has_scale:
            return parts
        if self.training and torch.is_grad_enabled():
            self.outbox.append(parts)
        mean, deviation = self._scale()
        return (parts - mean) / deviation

    def unscaled(self, parts: Tensor) -> Tensor:
        """The reverse."""
        mean, deviation = self._scale()
        return parts * deviation + mean

    def _scale(self) -> tuple[Tensor, Tensor]:
        count, total, squares = self.sums.float().unbind()
        mean = total / count.clamp(min=1.0)
        spread = (squares / count.clamp(min=1.0) - mean.square()).clamp(min=_LEAST).sqrt()
        return mean, torch.where(count > 0, spread, torch.ones_like(spread))

    @torch.no_grad()
    def after_step(self, gather: Gather) -> None:
        """Adds the step's latents to the sums, those of all replicas, until they are enough."""
        if self.outbox and float(self.sums[0, 0]) < _ENOUGH:
            vectors = torch.cat(self.outbox).flatten(0, 1)
            own = torch.stack([torch.full_like(vectors[0], len(vectors)), vectors.sum(0), vectors.square().sum(0)])
            self.sums += gather.total(own)
        self.outbox.clear()

    def discard_step(self) -> None:
        """Drops the step's latents."""
        self.outbox.clear()

    def left(self, times: Tensor) -> Tensor:
        """The part of the way from ``times [B]`` to the picture, ``[B, 1, 1]``, not below where velocities explode."""
        return (1.0 - times).clamp(min=_NEAR_THE_END)[:, None, None]

    def velocities(self, mixed: Tensor, times: Tensor, condition: Tensor, mask: Tensor, left_out: Tensor) -> Tensor:
        """The velocity of each part, fp32 ``[B, N, W]``; arguments as those of ``Denoiser``, ``mixed`` in fp32."""
        found = self.denoiser(mixed.to(condition.dtype), times, condition, mask, left_out).float()
        velocity: Tensor = found if self.target == "velocity" else (found - mixed) / self.left(times)
        return velocity

    @torch.no_grad()
    def draw(
        self,
        condition: Tensor,
        mask: Tensor,
        noise: Tensor,
        steps: int,
        guidance: float,
        kept: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Parts of pictures, fp32 ``[B, N, W]``, scaled, by Euler's method.

        Args:
            condition: ``[B, C, E]``.
            mask: bool ``[B, C]``.
            noise: fp32 ``[B, N, W]``.
            steps: From noise to picture.
            guidance: See ``Diffusion``.
            kept: bool ``[B, N]``, which parts are known; None for none.
            known: What they are, scaled, ``[B, N, W]``.
        """
        count, x = len(noise), noise
        twice = condition.repeat(2, 1, 1), mask.repeat(2, 1)
        without = torch.arange(2 * count, device=noise.device) >= count
        for step in range(steps):
            time = step / steps
            if guidance == 1.0:
                velocity = self.velocities(x, x.new_full((count,), time), condition, mask, without[:count])
            else:
                both = self.velocities(x.repeat(2, 1, 1), x.new_full((2 * count,), time), *twice, without)
                velocity = both[count:] + guidance * (both[:count] - both[count:])
            x = x + velocity / steps
            if kept is not None:
                assert known is not None
                after = (step + 1) / steps
                x = torch.where(kept[..., None], after * known + (1.0 - after) * noise, x)
        return x

    def folded(self, parts: Tensor) -> Tensor:
        """Pixel parts ``[B, N, 3 p^2]`` as pictures ``[B, 3, H, W]``."""
        cut = parts.reshape(len(parts), self.grid, self.grid, 3, self.patch_size, self.patch_size)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(parts), 3, self.side, self.side)
