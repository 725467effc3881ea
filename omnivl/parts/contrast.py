"""The layer between the encoders and the decoders: embeddings, UniVLC, hard negatives, alignment rows.

Shapes: B samples of this replica, J = replicas * B joined samples, S visual positions, L text positions, D hidden size,
P projection size, R alignment rows.

- class tokens are projected and L2-normalised in fp32; the momentum twins' projections live here too;
- the joined batch's keys and the queue's make UniVLC's loss (``univlc/loss``);
- hard negatives are drawn from the similarities, and the decoders' rows are laid out by indices into ``memory``: no
  visual feature is copied, however many texts attend to it;
- the queue takes its keys in ``after_step``, once per optimizer step, from an outbox. This layer is never recomputed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.chain import ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.objective import Objective
from omnivl.chain.state import State, StepLayout, encoded_rows
from omnivl.data.batch import DATA_KINDS
from omnivl.errors import ModelError
from omnivl.objectives.univlc import Keys, Pairs, SoftTargets, UniVLC, contrast_metrics
from omnivl.objectives.vlm import NEGATIVE_TEXT, NEGATIVE_VISUAL, POSITIVE, VLM, draw_negatives
from omnivl.parts.config import ModelConfig
from omnivl.parts.key_queue import KeyQueue
from omnivl.parts.linear import Linear


class Contrast(ChainLayer):
    """Projects, contrasts and mines; turns encoder streams into what the decoders and losses read.

    Reads ``visual``, ``text``, ``text_mask``, the momentum streams, ``identity`` and ``vlm/uniforms``; drops the
    streams and leaves

    - ``visual_embedding``, ``text_embedding`` where there are clean rows;
    - ``univlc/loss`` and ``metric/univlc/...``;
    - ``{name}/features``: ``[M, S, D]`` of masked visual passes that no text looks at, ``[M, L, D]`` of masked texts
      that look at none;
    - ``memory``, whose rows 0 .. B - 1 are this replica's samples (other replicas' follow where negatives are global,
      then masked ones that a text looks at), ``alignment``, ``alignment_mask``, ``alignment_memory``;
    - ``vlm/has_negative`` bool ``[B]``.
    """

    def __init__(self, config: ModelConfig, objectives: Sequence[Objective], gather: Gather | None = None) -> None:
        """Builds the projections, and the twins and the queue where UniVLC asks for them.

        Raises:
            ModelError: An objective needs momentum twins and the model has none.
        """
        super().__init__()
        require_momentum(config, objectives)
        self.config = config
        self.gather: Gather = LocalGather() if gather is None else gather
        self.univlc = next((o for o in objectives if isinstance(o, UniVLC)), None)
        self.vlm = next((o for o in objectives if isinstance(o, VLM)), None)
        self.outbox: list[Keys] = []
        self.visual_projection = Linear(config.hidden_size, config.projection_size)
        self.text_projection = Linear(config.hidden_size, config.projection_size)
        options = UniVLC() if self.univlc is None else self.univlc
        # One element instead of a scalar: sharding hosts want parameters that can be cut.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(options.temperature)]), options.learn_temperature)
        low, high = options.temperature_bounds
        self.log_scale_bounds = (-math.log(high), -math.log(low))
        self.momentum_visual_projection: nn.Module | None = None
        self.momentum_text_projection: nn.Module | None = None
        self.queue: KeyQueue | None = None
        if self.univlc is not None and self.univlc.uses_momentum:
            self._build_momentum(self.univlc)

    def _build_momentum(self, univlc: UniVLC) -> None:
        sizes = self.config.hidden_size, self.config.projection_size
        self.momentum_visual_projection = frozen_twin(Linear(*sizes), self.visual_projection)
        self.momentum_text_projection = frozen_twin(Linear(*sizes), self.text_projection)
        if univlc.queue_size > 0:
            self.queue = KeyQueue(univlc.queue_size, self.config.projection_size)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Without UniVLC nothing here has a gradient: hard negatives are drawn without one."""
        if self.univlc is None or not any(self.univlc.name in layout.objectives for layout in layouts):
            yield from self.parameters()

    def scale(self) -> Tensor:
        """1 / temperature, fp32 scalar with gradient, within the bounds of the plan."""
        scale: Tensor = bounded(self.logit_scale, *self.log_scale_bounds).exp()[0]
        return scale

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        state = self._embed(state)
        if layout.mode == "encode":
            return state
        if layout.mode == "train" and self.univlc is not None and self.univlc.name in layout.objectives:
            state = self._contrast(state, self.univlc)
        state = self._decoder_rows(state)
        kept = ("momentum_visual",) if layout.visual.keys() - {"clean"} else ()
        features = {
            f"{name}/features": self._rows(state, stream, name)
            for stream, segments in (("visual", layout.visual), ("text", layout.text))
            for name in segments
            if name != "clean" and name not in layout.alignment
        }
        streams = ("visual", "text", "text_mask", "visual_input", "text_input", "momentum_visual", "momentum_text")
        return state.merged(features, drop=tuple(name for name in streams if name not in kept))

    def _embed(self, state: State) -> State:
        """Adds the embeddings of whichever clean streams there are."""
        layout, found = state.layout, dict[str, Tensor]()
        if layout.mode != "encode" and not layout.embeddings:
            return state
        if "visual" in state and "clean" in layout.visual:
            found["visual_embedding"] = embed(self.visual_projection, self._rows(state, "visual", "clean"))
        if "text" in state and "clean" in layout.text:
            found["text_embedding"] = embed(self.text_projection, self._rows(state, "text", "clean"))
        return state.merged(found)

    def _rows(self, state: State, stream: str, segment: str) -> Tensor:
        """A segment of what the encoder made of a stream."""
        segments = state.layout.visual if stream == "visual" else state.layout.text
        first = encoded_rows(self.config, state.layout, stream).start
        return state[stream][segments[segment].start - first : segments[segment].stop - first]

    def _contrast(self, state: State, univlc: UniVLC) -> State:
        """Adds UniVLC's loss and metrics; puts the batch's keys into the outbox."""
        queries = Pairs(state["visual_embedding"], state["text_embedding"], state["identity"])
        momentum = self._momentum_pairs(state) if univlc.uses_momentum else None
        online = univlc.batch_keys == "online"
        source = queries if online or momentum is None else momentum
        keys = self._joined(source, state.layout)
        num_batch_keys = len(keys.identity)
        if self.queue is not None:
            assert momentum is not None
            if self.training and torch.is_grad_enabled():
                self.outbox.append(self._joined(momentum, state.layout) if online else keys)
            keys = keys.followed_by(self.queue.keys())
        soft = None
        if univlc.soft_target_alpha > 0.0:
            assert momentum is not None
            soft = SoftTargets(momentum.visual, momentum.text, state[f"{univlc.name}/alpha"])
        scale = self.scale()
        metrics = contrast_metrics(queries, keys, num_batch_keys, 1.0 / scale)
        return state.merged(
            {
                f"{univlc.name}/loss": univlc.contrast(queries, keys, scale, soft),
                **{f"metric/{univlc.name}/{name}": value for name, value in metrics.items()},
            }
        )

    @torch.no_grad()
    def _momentum_pairs(self, state: State) -> Pairs:
        assert self.momentum_visual_projection is not None
        assert self.momentum_text_projection is not None
        return Pairs(
            embed(self.momentum_visual_projection, state["momentum_visual"]),
            embed(self.momentum_text_projection, state["momentum_text"]),
            state["identity"],
        )

    def _joined(self, pairs: Pairs, layout: StepLayout) -> Keys:
        """The keys of all replicas' samples. Every replica's batch has the same kind."""
        identity = self.gather.join(pairs.identity)
        domain = torch.full_like(identity, DATA_KINDS.index(layout.kind))
        valid = torch.ones_like(identity, dtype=torch.bool)
        return Keys(self.gather.join(pairs.visual), self.gather.join(pairs.text), identity, domain, valid)

    def _decoder_rows(self, state: State) -> State:
        """Adds ``memory`` and the alignment rows.

        To match given pairs, ``match/rows`` int64 ``[R]`` may name the row of ``memory`` of each text; without it text
        i goes with row i.
        """
        layout, found = state.layout, dict[str, Tensor]()
        if "visual" in state and "clean" in layout.visual:
            # The unified transformer joins what entered it, the decoders attend to what the encoder made of it.
            found["memory"] = state["visual_input" if "visual_input" in state else "visual"][layout.visual["clean"]]
        if layout.mode == "match":
            text = state["text_input" if "text_input" in state else "text"][layout.text["clean"]]
            found["alignment"], found["alignment_mask"] = text, state["text_mask"][layout.text["clean"]]
            own = torch.arange(len(text), device=text.device)
            found["alignment_memory"] = state.get("match/rows", own)
        elif layout.mode == "train" and layout.alignment:
            found |= self._alignment_rows(state.merged(found))
        return state.merged(found)

    def _alignment_rows(self, state: State) -> dict[str, Tensor]:
        """Lays out the alignment rows of a training step, segment by segment."""
        layout, found = state.layout, dict[str, Tensor]()
        memory = [state["memory"]] if "memory" in state else []
        own = torch.arange(layout.batch_size, device=state["text_mask"].device)
        texts = state["text_input" if "text_input" in state else "text"]
        rows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # text, mask, row of memory
        for name in layout.alignment.keys() & layout.text.keys():
            segment = layout.text[name]
            rows[name] = texts[segment], state["text_mask"][segment], own
        if POSITIVE in layout.alignment:
            assert self.vlm is not None
            text, mask = texts[layout.text["clean"]], state["text_mask"][layout.text["clean"]]
            candidates, candidate_mask = text, mask
            if self.vlm.negatives == "global":
                candidates, candidate_mask = self._own_first(text), self._own_first(mask)
                memory = [self._own_first(state["memory"])]
            negative_visual, negative_text, has_negative = self._negatives(state, self.vlm)
            rows[POSITIVE] = text, mask, own
            rows[NEGATIVE_VISUAL] = text, mask, negative_visual
            rows[NEGATIVE_TEXT] = candidates[negative_text], candidate_mask[negative_text], own
            found[f"{self.vlm.name}/has_negative"] = has_negative
        for name in layout.both_masked:
            text, mask, _ = rows[name]
            visual = state["visual_input"][layout.visual[name]]
            start = sum(map(len, memory))
            rows[name] = text, mask, torch.arange(start, start + len(visual), device=visual.device)
            memory.append(visual)
        found["memory"] = memory[0] if len(memory) == 1 else torch.cat(memory)
        ordered = [rows[name] for name in layout.alignment]
        found["alignment"] = torch.cat([text for text, _, _ in ordered])
        found["alignment_mask"] = torch.cat([mask for _, mask, _ in ordered])
        found["alignment_memory"] = torch.cat([memory for _, _, memory in ordered])
        return found

    def _own_first(self, tensor: Tensor) -> Tensor:
        """Joins ``[B, ...]`` over the replicas and turns the rows so that this replica's come first, ``[J, ...]``."""
        return self.gather.join(tensor).roll(-self.gather.replica * len(tensor), dims=0)

    @torch.no_grad()
    def _negatives(self, state: State, vlm: VLM) -> tuple[Tensor, Tensor, Tensor]:
        """Hard negatives of each sample.

        Returns:
            The row of the negative visual and of the negative text among the candidates, own samples first (int64
            ``[B]`` each), and whether there is one (bool ``[B]``).
        """
        visual, text, identity = state["visual_embedding"], state["text_embedding"], state["identity"]
        # Drawn in replica order, then counted from the own rows on: the draw is the one of the joined batch.
        world = self.gather if vlm.negatives == "global" else LocalGather()
        admissible = identity[:, None] != world.join(identity)
        uniforms, scale = state[f"{vlm.name}/uniforms"], self.scale()
        drawn = [
            draw_negatives(scale * (query @ world.join(key.detach()).t()), admissible, uniform, vlm.epsilon)
            for query, key, uniform in ((text, visual, uniforms[:, 0]), (visual, text, uniforms[:, 1]))
        ]
        count = admissible.shape[1]
        negative_visual, negative_text = ((row - world.replica * len(identity)) % count for row in drawn)
        return negative_visual, negative_text, admissible.any(-1)

    def after_step(self) -> None:
        """Moves the projections' twins and hands the step's keys to the queue, oldest micro-batch first."""
        for twin, online in (
            (self.momentum_visual_projection, self.visual_projection),
            (self.momentum_text_projection, self.text_projection),
        ):
            if twin is not None:
                assert self.config.momentum is not None
                ema_update_(twin, online, self.config.momentum.decay, self.local_storage)
        if self.queue is not None:
            for keys in self.outbox:
                self.queue.push(keys)
        self.outbox.clear()

    def discard_step(self) -> None:
        """Forgets the step's keys."""
        self.outbox.clear()


def require_momentum(config: ModelConfig, objectives: Sequence[Objective]) -> None:
    """Refuses objectives that the model cannot serve.

    Raises:
        ModelError: An objective needs momentum twins and the model has none.
    """
    wanting = [objective.name for objective in objectives if objective.uses_momentum]
    if wanting and config.momentum is None:
        raise ModelError(
            f"objectives {', '.join(wanting)}: need momentum twins, but model.momentum is off; set model.momentum, or "
            "univlc: queue_size 0, batch_keys online, soft_target_alpha 0, and targets: pixels for masked objectives"
        )


def embed(projection: nn.Module, stream: Tensor) -> Tensor:
    """Projects the first position of ``stream [B, positions, D]``; fp32 ``[B, P]``, L2-normalised."""
    return F.normalize(projection(stream[:, 0].float()), dim=-1)


class _Bounded(torch.autograd.Function):
    """A clamp whose gradient can always lead back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (x,), (low, high) = gradients, ctx.saved_tensors, ctx.bounds
        outwards = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        return torch.where(outwards, 0.0, gradient), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped to [low, high], with a gradient that can always lead back.

    Plain clamping has no gradient outside its bounds: a parameter that once stepped over one would stay there for good.
    Here the gradient passes everywhere but where a descent step would push an ``x`` at or beyond a bound further out.
    """
    clamped: Tensor = _Bounded.apply(x, low, high)  # type: ignore[no-untyped-call]
    return clamped
