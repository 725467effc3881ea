"""Quantizers: vectors to numbers of codes, and to the vectors of these codes with a gradient that passes through.

A new quantizer is a configuration with ``num_codes``, ``size`` and ``build``, and an entry in ``QuantizerConfig``.

Shapes: K vectors, W width of a code, V codes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head
from omnivl.parts.linear import draw_normal

_BARELY_USED = 1e-6


@dataclass(frozen=True)
class VectorQuantizer:
    """The nearest of V learnt vectors.

    Attributes:
        num_codes: V.
        size: W.
        update: ``ema``: a code is the moving mean of the vectors that it was nearest to. ``gradient``: codes are
            weights, and their squared distance to these vectors is part of the loss.
        decay: Of the moving mean, per optimizer step.
        commitment: Weight of the squared distance of vectors to their codes.
        restart_after: With ``ema``, a code that was nearest to no vector in this many optimizer steps takes the place
            of a vector of the step, drawn from those of all replicas; in the first step all codes do. 0: none ever
            does, and codes start where they were drawn.

    Source: van den Oord et al., VQ-VAE, arXiv 1711.00937, equation 3, and appendix A.1 for ``ema``; restarts: Dhariwal
        et al., Jukebox, arXiv 2005.00341, section 3.1.
    Differs: moving means start as if each code had been used once, so that a code that is never used stays where it is
        and nothing has to be smoothed. Restarts go by steps without use, not by a moving mean of uses, so that the
        decay does not put them off.
    """

    kind: Literal["vq"] = "vq"
    num_codes: Annotated[int, Range(2)] = 8192
    size: Annotated[int, Range(1)] = 32
    update: Literal["ema", "gradient"] = "ema"
    decay: Annotated[float, Range(0.0, 1.0)] = 0.99
    commitment: Annotated[float, Range(0.0)] = 0.25
    restart_after: Annotated[int, Range(0)] = 10

    def build(self) -> "Quantizer":
        """The quantizer."""
        return NearestCode(self)


@dataclass(frozen=True)
class LookupFree:
    """The sign of each value: W values are W bits of a code's number, and no codebook is stored.

    Attributes:
        size: W; there are V = 2^W codes.
        commitment: Weight of the squared distance of vectors to their signs.
        entropy: Weight of the entropy term: each bit of a vector shall be certain, and each be set in half of all.
        temperature: Of the probability that a bit is set, from squared distances to 1 and to -1.

    Source: Yu et al., MAGVIT-v2, arXiv 2310.05737, section 3.1 and equation 5.
    Differs: the entropy of all vectors' mean is a sum over bits, which is its upper bound, not over V codes.
    """

    kind: Literal["lookup_free"] = "lookup_free"
    size: Annotated[int, Range(1, 30)] = 13
    commitment: Annotated[float, Range(0.0)] = 0.25
    entropy: Annotated[float, Range(0.0)] = 0.1
    temperature: Annotated[float, Range(0.001)] = 1.0

    @property
    def num_codes(self) -> int:
        """V."""
        return 1 << self.size

    def build(self) -> "Quantizer":
        """The quantizer."""
        return Signs(self)


QuantizerConfig = Annotated[VectorQuantizer | LookupFree, Field(discriminator="kind")]
"""All quantizers that a plan can name, discriminated by ``kind``."""


class Quantizer(Head, ABC):
    """Base of the quantizers. All is computed in fp32."""

    num_codes: int

    def search_flops(self, vectors: float) -> float:
        """Operations of the search for the codes of ``vectors``, their number. It has no backward pass."""
        return 0.0

    @abstractmethod
    def codes(self, vectors: Tensor) -> Tensor:
        """Numbers of the codes, int64 ``[K]``, of ``vectors [K, W]``; no gradient."""

    @abstractmethod
    def vectors_of(self, codes: Tensor) -> Tensor:
        """The vectors, fp32 ``[K, W]``, of codes, int64 ``[K]``."""

    @abstractmethod
    def forward(self, vectors: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes ``vectors [K, W]``, fp32.

        Returns:
            The codes' vectors ``[K, W]``, whose gradient is passed on to ``vectors`` as it is; their numbers, int64
            ``[K]``; and the quantizer's own loss, a scalar.
        """


class NearestCode(Quantizer):
    """See ``VectorQuantizer``."""

    codebook: Tensor
    uses: Tensor
    sums: Tensor
    unused: Tensor
    steps: Tensor

    def __init__(self, config: VectorQuantizer) -> None:
        super().__init__()
        self.config, self.num_codes = config, config.num_codes
        drawn = torch.empty(config.num_codes, config.size)
        draw_normal(drawn, std=1.0)
        self.outbox: list[tuple[Tensor, Tensor]] = []
        if config.update == "gradient":
            self.codebook = nn.Parameter(drawn)
            return
        self.register_buffer("codebook", drawn)
        self.register_buffer("uses", torch.ones(config.num_codes))
        self.register_buffer("sums", drawn.clone())
        self.register_buffer("unused", torch.zeros(config.num_codes, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def search_flops(self, vectors: float) -> float:
        """Of the products with all codes."""
        return 2.0 * vectors * self.num_codes * self.config.size

    @torch.no_grad()
    def codes(self, vectors: Tensor) -> Tensor:
        """|v - c|^2 is smallest where v . c - |c|^2 / 2 is largest."""
        codebook = self.codebook.float()
        return (vectors.float() @ codebook.t() - codebook.square().sum(1) / 2).argmax(1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """Rows of the codebook."""
        return F.embedding(codes, self.codebook.float())

    def forward(self, vectors: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Quantizer``. In training with ``ema``, the step's vectors are kept for ``after_step``."""
        codes = self.codes(vectors)
        nearest = self.vectors_of(codes)
        loss = self.config.commitment * F.mse_loss(vectors, nearest.detach())
        if self.config.update == "gradient":
            loss = loss + F.mse_loss(nearest, vectors.detach())
        elif self.training and torch.is_grad_enabled():
            self.outbox.append((vectors.detach(), codes))
        return passed_on(vectors, nearest), codes, loss

    @torch.no_grad()
    def after_step(self, gather: Gather) -> None:
        """Moves the means to the vectors of the step, those of all replicas, and restarts codes that are due."""
        if not self.outbox:
            return
        vectors = gather.join(torch.cat([each for each, _ in self.outbox]))
        codes = gather.join(torch.cat([each for _, each in self.outbox]))
        self.outbox.clear()
        chosen = F.one_hot(codes, self.num_codes).to(vectors.dtype)
        counts = chosen.sum(0)
        self.uses.lerp_(counts, 1.0 - self.config.decay)
        self.sums.lerp_(chosen.t() @ vectors, 1.0 - self.config.decay)
        used = self.uses > _BARELY_USED
        self.codebook[used] = self.sums[used] / self.uses[used, None]
        self.unused.add_(1).masked_fill_(counts > 0, 0)
        if self.config.restart_after:
            self._restart(vectors, (self.unused >= self.config.restart_after) | (self.steps == 0))
        self.steps += 1

    def _restart(self, vectors: Tensor, due: Tensor) -> None:
        """Puts codes where vectors are, as many as there are vectors.

        Args:
            vectors: ``[K, W]``, those of all replicas in the same order on each, so that all restart alike.
            due: bool ``[V]``.
        """
        codes = due.nonzero()[:, 0][: len(vectors)]
        random = torch.Generator(device="cpu").manual_seed(int(self.steps))
        drawn = vectors[torch.randperm(len(vectors), generator=random)[: len(codes)].to(vectors.device)]
        self.codebook[codes], self.sums[codes], self.uses[codes], self.unused[codes] = drawn, drawn, 1.0, 0

    def discard_step(self) -> None:
        """Drops the step's vectors."""
        self.outbox.clear()


class Signs(Quantizer):
    """See ``LookupFree``."""

    def __init__(self, config: LookupFree) -> None:
        super().__init__()
        self.config, self.num_codes = config, config.num_codes

    @torch.no_grad()
    def codes(self, vectors: Tensor) -> Tensor:
        """Bit i is set where value i is above 0."""
        return ((vectors > 0).long() << torch.arange(self.config.size, device=vectors.device)).sum(1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """1 where a bit is set, else -1."""
        bits = codes[:, None] >> torch.arange(self.config.size, device=codes.device) & 1
        return 2.0 * bits.float() - 1.0

    def forward(self, vectors: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Quantizer``. The mean of the entropy term runs over the vectors of all replicas."""
        signs = torch.where(vectors > 0, 1.0, -1.0)
        loss = self.config.commitment * F.mse_loss(vectors, signs)
        # (v + 1)^2 - (v - 1)^2 = 4 v
        probability = torch.sigmoid(4.0 * vectors / self.config.temperature)
        mean = gather.join(probability.mean(0, keepdim=True)).mean(0)
        each: Tensor = bit_entropy(probability).sum(1).mean()
        loss = loss + self.config.entropy * (each - bit_entropy(mean).sum())
        return passed_on(vectors, signs), self.codes(vectors), loss


def passed_on(vectors: Tensor, quantized: Tensor) -> Tensor:
    """The values of ``quantized`` with the gradient of ``vectors``: the straight-through estimator."""
    passed: Tensor = vectors + (quantized - vectors).detach()
    return passed


def bit_entropy(probability: Tensor) -> Tensor:
    """The entropy, in nats, of bits that are set with ``probability``, of any shape."""
    entropy: Tensor = torch.special.entr(probability) + torch.special.entr(1.0 - probability)
    return entropy


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs among codes, int64 ``[K]``: fp32 ``[V]``; unlike ``bincount`` without values, too."""
    ones = torch.ones(len(codes), device=codes.device)
    return ones.new_zeros(num_codes).index_add(0, codes, ones)


def perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """The exponential of the entropy of codes, int64 ``[K]``: fp32, from 1 to V, the number of codes used alike."""
    shares = code_counts(codes, num_codes) / max(1, len(codes))
    alike: Tensor = torch.special.entr(shares).sum().exp()
    return alike
