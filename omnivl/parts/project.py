"""The layer after the encoders: embeddings in a common space, and the temperature of their comparison.

Shapes: B samples of this replica, S visual positions, L text positions, M pooled positions, D hidden size, P projection
size.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from omnivl.chain.chain import EMBEDDING_STACK, ChainLayer
from omnivl.chain.demands import CLEAN, EMBEDDINGS, PARTS, REGION_EMBEDDINGS, REGIONS, TWIN, embedding_of
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.objective import Objective, temperature_of
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout, part
from omnivl.errors import ModelError
from omnivl.parts.embed import encoded_rows
from omnivl.parts.linear import Linear
from omnivl.parts.similarity import unit_length
from omnivl.parts.sizes import MomentumConfig


class Pool(Protocol):
    """Chooses the positions of a segment's rows that are projected."""

    def __call__(self, stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
        """The pooled position, ``[R, D]``, or several that each get an embedding, ``[R, M, D]``.

        Args:
            stream: Rows of one segment ``[R, positions, D]``, of the encoder or of its momentum twin.
            state: The state after the encoders.
            segment: Which one.
        """


def first(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The first position: a class token, ``[CLS]``."""
    return stream[:, 0]


def last_token(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The last position of a text that is not padding: the end token, for causal encoders."""
    mask = state["text_mask"][state.layout.text[segment]]
    place = mask.long().cumsum(1).argmax(1)
    return stream.gather(1, place[:, None, None].expand(-1, 1, stream.shape[-1]))[:, 0]


def mean_patch(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The mean of all positions behind the first, the patches.

    Source: Beyer et al., Better plain ViT baselines for ImageNet-1k, arXiv 2205.01580, section 2.
    """
    if "visual_mask" not in state:
        return stream[:, 1:].mean(1)
    mask = state["visual_mask"][state.layout.visual[segment], 1:, None].to(stream.dtype)
    return (stream[:, 1:] * mask).sum(1) / mask.sum(1)


def mean_word(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The mean of all positions of a text that are no padding, special tokens included."""
    mask = state["text_mask"][state.layout.text[segment]][..., None].to(stream.dtype)
    return (stream * mask).sum(1) / mask.sum(1)


Pooling = Literal["first", "mean"]

_MEANS: Mapping[str, Pool] = {"visual": mean_patch, "text": mean_word}


def pools_of(**poolings: Pooling) -> dict[str, Pool]:
    """The pools of streams by what a plan says, for ``Project``."""
    return {stream: _MEANS[stream] for stream, pooling in poolings.items() if pooling == "mean"}


class Project(ChainLayer):
    """Projects one position, or several, of the clean rows, L2-normalised in fp32.

    Adds ``visual_embedding`` and ``text_embedding`` if there are clean rows, those of the twins
    (``momentum_visual_embedding``, ``momentum_text_embedding``) and of their other positions
    (``momentum_visual_parts``, ``momentum_text_parts``), ``{segment}/embedding`` of other texts, those of regions
    and of what is said of them (``REGION_EMBEDDINGS``, of first positions), and ``logit_scale``, as the layout
    requires. This layer is never recomputed.
    """

    stack = EMBEDDING_STACK

    def __init__(
        self,
        sizes: HeadSizes,
        objectives: Sequence[Objective],
        momentum: MomentumConfig | None = None,
        *,
        joins_inputs: bool = False,
        bias: bool = True,
        pools: Mapping[str, Pool] | None = None,
        several: Collection[str] = (),
        unprojected: Collection[str] = (),
    ) -> None:
        """Builds the projections, and their twins if an objective reads them.

        Args:
            sizes: Widths of the streams and of the projections.
            objectives: The stage's objectives; the first that has a temperature sets it.
            momentum: Of the twins; None builds none.
            joins_inputs: Whether only rows that are read unjoined have gone through the encoder; see ``Embed``.
            bias: Whether the projections have a bias.
            pools: How streams are pooled; by default the first position is projected. An encoder with ``may_shorten``
                returns no other position.
            several: Streams whose samples keep the embeddings of all pooled positions, ``[B, M, P]``; those of other
                streams are averaged.
            unprojected: Streams whose pooled position is the embedding as it is.

        Raises:
            ModelError: An objective needs momentum twins and the model has none.
        """
        super().__init__()
        require_momentum(momentum, objectives)
        self.momentum, self.joins_inputs, self.pools = momentum, joins_inputs, pools or {}
        self.several = several

        def projection(stream: str) -> nn.Module:
            if stream in unprojected:
                return nn.Identity()
            return Linear(sizes.widths[stream], sizes.projection_size, bias=bias)

        self.visual_projection, self.text_projection = projection("visual"), projection("text")
        options = temperature_of(objectives)
        # One element instead of a scalar: hosts that shard cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.initial)]), options.learnt)
        low, high = options.bounds
        self.log_scale_bounds = (-math.log(high), -math.log(low))
        self.momentum_visual_projection: nn.Module | None = None
        self.momentum_text_projection: nn.Module | None = None
        asked = [demands for objective in objectives for demands in objective.demands_of_kinds.values()]
        if any(TWIN + name in demands.fields for demands in asked for name in (*EMBEDDINGS, *PARTS)):
            self.momentum_visual_projection = frozen_twin(projection("visual"), self.visual_projection)
            self.momentum_text_projection = frozen_twin(projection("text"), self.text_projection)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Parameters that no loss reads: hard negatives are drawn without a gradient."""
        read = frozenset[str]().union(*(layout.reads for layout in layouts))
        of_regions = not read.isdisjoint(REGION_EMBEDDINGS)
        if "visual_embedding" not in read and not of_regions:
            yield from self.visual_projection.parameters()
        if "text_embedding" not in read and not of_regions and not any(layout.embedded_texts for layout in layouts):
            yield from self.text_projection.parameters()
        if "logit_scale" not in read:
            yield self.logit_scale

    def scale(self) -> Tensor:
        """1 / temperature, fp32 scalar with gradient, within the bounds of the plan."""
        scale: Tensor = bounded(self.logit_scale, *self.log_scale_bounds).exp()[0]
        return scale

    def forward(self, state: State) -> State:
        """See the class."""
        layout, found = state.layout, dict[str, Tensor]()
        if layout.embeds:
            for stream, projection in (("visual", self.visual_projection), ("text", self.text_projection)):
                if stream in state and CLEAN in layout.segments(stream):
                    rows = self._rows(state, stream, CLEAN)
                    found[f"{stream}_embedding"] = self._embedding(projection, stream, rows, state)
        for segment in layout.embedded_texts:
            pooled = self.pools.get("text", first)(self._rows(state, "text", segment), state, segment)
            found[embedding_of(segment)] = embed(self.text_projection, pooled)
        if layout.embeds_regions:
            of_regions = self.visual_projection, self.text_projection
            rows_of_both = state["regions"], self._rows(state, "text", REGIONS)
            for name, projection, rows in zip(REGION_EMBEDDINGS, of_regions, rows_of_both, strict=True):
                found[name] = embed(projection, rows[:, 0])
        with torch.no_grad():
            for stream, twin in (("visual", self.momentum_visual_projection), ("text", self.momentum_text_projection)):
                asked = {f"{TWIN}{stream}_{what}" for what in ("embedding", "parts")} & layout.fields
                if not asked:
                    continue
                assert twin is not None, "the layout asks for momentum embeddings, no projection was built for them"
                rows = part(state[TWIN + stream], layout.twins[stream][CLEAN])
                if f"{TWIN}{stream}_embedding" in asked:
                    found[f"{TWIN}{stream}_embedding"] = self._embedding(twin, stream, rows, state)
                if f"{TWIN}{stream}_parts" in asked:
                    found[f"{TWIN}{stream}_parts"] = unit_length(twin(rows[:, 1:].float()))
        if "logit_scale" in layout.fields:
            found["logit_scale"] = self.scale()
        return state.merged(found)

    def _embedding(self, projection: nn.Module, stream: str, rows: Tensor, state: State) -> Tensor:
        return embed(projection, self.pools.get(stream, first)(rows, state), stream in self.several)

    def _rows(self, state: State, stream: str, segment: str) -> Tensor:
        """The rows of a segment of an encoded stream."""
        rows = state.layout.segments(stream)[segment]
        first = encoded_rows(state.layout, stream).start if self.joins_inputs else 0
        return part(state[stream], slice(rows.start - first, rows.stop - first))

    def after_step(self) -> None:
        """Updates the projections' twins."""
        for twin, online in (
            (self.momentum_visual_projection, self.visual_projection),
            (self.momentum_text_projection, self.text_projection),
        ):
            if twin is not None:
                assert self.momentum is not None
                ema_update_(twin, online, self.momentum.decay, self.local_storage)


def require_momentum(momentum: MomentumConfig | None, objectives: Sequence[Objective]) -> None:
    """Refuses objectives that the model cannot serve.

    Raises:
        ModelError: An objective needs momentum twins and the model has none.
    """
    wanting = [objective.key for objective in objectives if objective.twins]
    if wanting and momentum is None:
        raise ModelError(
            f"objectives {', '.join(wanting)}: need momentum twins, but model.momentum is off; set model.momentum, or "
            "univlc: queue_size 0, batch_keys online, soft_target_alpha 0, and targets: pixels for masked objectives"
        )


def embed(projection: nn.Module, pooled: Tensor, several: bool = False) -> Tensor:
    """Projects ``pooled [B, D]``; fp32 ``[B, P]``, L2-normalised.

    For ``[B, M, D]`` the mean of the M embeddings, or, if ``several`` is true, all of them, ``[B, M, P]``.
    """
    made = unit_length(projection(pooled.float()))
    return made if several or made.dim() == 2 else unit_length(made.mean(1))


class _Bounded(torch.autograd.Function):
    """A clamp with the gradient that ``bounded`` describes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (x,), (low, high) = gradients, ctx.saved_tensors, ctx.bounds
        below = torch.where(x <= low, gradient.clamp(max=0.0), gradient)
        return torch.where(x >= high, below.clamp(min=0.0), below), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped to [low, high], with a gradient that can always move it back inside.

    Plain clamping has no gradient outside its bounds: a parameter that has left them would never change again. Here the
    gradient is zero only where a descent step would move an ``x`` at or beyond a bound further out.
    """
    clamped: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return clamped
