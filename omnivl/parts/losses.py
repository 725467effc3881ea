"""The last layer: owns the heads, computes every active objective's loss and adds them up.

Shapes: B samples, R rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe.config import FeedForwardConfig, SparseConfig
from moe.routers.health import layer_health, mean_health, routing_health
from moe.routers.sums import RouterSums
from omnivl.chain.chain import ChainLayer
from omnivl.chain.demands import TWIN, VOCABULARY
from omnivl.chain.flops import num_rows, written
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.layout import present_modalities
from omnivl.chain.momentum import ema_update_, frozen_twin
from omnivl.chain.names import stack_of
from omnivl.chain.objective import Head, Heads, Objective, cached_loss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.sizes import MODALITIES, MomentumConfig

_SCALARS = ("loss", "metric")
_VOCABULARY_TWIN = TWIN + VOCABULARY


class Losses(ChainLayer):
    """Heads, losses and predictions. Objectives of one kind may share a head (``Objective.head_key``).

    In training the result has ``loss/{key}`` and ``metric/{key}/{metric}`` of every active objective, and ``loss``, the
    sum of ``weight/{key}`` (from the state; 1 if missing) times ``loss/{key}``. Routed layers add
    ``loss/router/{name}``, weighted by the model's configuration, and ``metric/router/{metric}``. Streams are dropped:
    only losses and metrics are returned.

    In a step that predicts the result has ``{key}/prediction`` of every objective that the layout names.
    """

    stack = "losses"

    def __init__(
        self,
        sizes: HeadSizes,
        objectives: Sequence[Objective],
        gather: Gather | None = None,
        *,
        fillings: Mapping[str, FeedForwardConfig] | None = None,
        momentum: MomentumConfig | None = None,
        vocabulary: Callable[[int, int], VocabularyHead] = VocabularyHead,
    ) -> None:
        """Builds the heads that ``objectives`` need; they share one vocabulary head.

        Args:
            sizes: Sizes of the streams, for heads.
            objectives: The stage's objectives.
            gather: How to see the other replicas; None for a single one.
            fillings: The feed-forward slots' fillings, by stack; their routers have auxiliary losses.
            momentum: Of the vocabulary head's twin.
            vocabulary: Makes the head on words from the width of their states and the number of words.
        """
        super().__init__()
        self.gather: Gather = LocalGather() if gather is None else gather
        self.momentum, self.text_length = momentum, sizes.text_length
        self.routing = RouterLosses({} if fillings is None else fillings)
        self.objectives = {objective.key: objective for objective in objectives}
        self.vocabulary: VocabularyHead | None = None
        self.momentum_vocabulary: nn.Module | None = None
        self.reading_words = {key for key, objective in self.objectives.items() if objective.reads(VOCABULARY)}
        if self.reading_words:
            self.vocabulary = vocabulary(sizes.words, sizes.vocab_size)
            if any(objective.reads(_VOCABULARY_TWIN) for objective in objectives):
                self.momentum_vocabulary = frozen_twin(vocabulary(sizes.words, sizes.vocab_size), self.vocabulary)
        owners = [objective for key, objective in self.objectives.items() if objective.head_key == key]
        built = {objective.key: objective.build_head(sizes) for objective in owners}
        self.heads = nn.ModuleDict({key: head for key, head in built.items() if head is not None})

    def heads_of(self, key: str) -> Heads:
        """The heads that an objective's ``loss`` and ``predict`` get."""
        heads = dict(self.heads.items())
        own = heads.get(self.objectives[key].head_key)
        borrowed = {other: heads[other] for other in self.objectives[key].borrows}
        if key not in self.reading_words:
            return Heads(own, borrowed=borrowed)
        return Heads(own, self.vocabulary, self.momentum_vocabulary, borrowed)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of heads on words: on the generation stream and on masked words, and of the shared one's twin on these.

        Added is what the heads of the step's objectives count themselves (``Head.flops``).
        """
        keys = (self.objectives[key].head_key for key in layout.objectives)
        acting = (self.heads[key] for key in keys if key in self.heads)
        total = sum((head.flops(layout, self.backward) for head in acting if isinstance(head, Head)), start=0.0)
        if self.vocabulary is not None:
            for name, own in layout.generation.items():
                seen = written(self.text_length, tokens, layout.joins[name].length)
                total += self.backward.passes * num_rows({name: own}) * seen * self.vocabulary.flops()
        read = self.text_length if tokens is None else tokens
        for key, objective in self.objectives.items():
            passes = self.backward.passes + objective.reads(_VOCABULARY_TWIN)
            for segment, share in objective.restored_words.items():
                rows = {segment: layout.text[segment]} if segment in layout.text else {}
                total += passes * read * share * num_rows(rows) * self._head_on_words(key).flops()
        return total

    def _head_on_words(self, key: str) -> VocabularyHead:
        """The shared one where the objective reads it, else the one that is part of its own head."""
        if key in self.reading_words:
            assert self.vocabulary is not None
            return self.vocabulary
        words = self.heads[key].words
        assert isinstance(words, VocabularyHead), f"the head of {key!r} scores words"
        return words

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """Heads of objectives that act in no step, and the vocabulary head if no step reads it."""
        active = {self.objectives[key].head_key for layout in layouts for key in layout.objectives}
        for key, head in self.heads.items():
            if key not in active:
                yield from head.parameters()
        if self.vocabulary is not None and not any(VOCABULARY in layout.reads for layout in layouts):
            yield from self.vocabulary.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """All of them: the heads that the objectives made, and the vocabulary head that they share."""
        yield from self.parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        if state.layout.mode == "train":
            return self._train(state)
        if state.layout.mode == "predict":
            keys = state.layout.objectives
            made = {f"{key}/prediction": self.objectives[key].predict(state, self.heads_of(key)) for key in keys}
            return state.merged(made)
        return state

    def _train(self, state: State) -> State:
        assert state.layout.objectives, f"no objective acts on {state.layout.kind}"
        losses, metrics = self._router(state)
        for key in state.layout.objectives:
            heads = self.heads_of(key)
            made = cached_loss(state, key, heads.own)
            if made is None:
                made = self.objectives[key].loss(state, heads, self.gather)
            assert made.loss.dtype == torch.float32, f"{key} computes its loss in {made.loss.dtype}"
            losses[key] = made.loss
            metrics |= {f"metric/{key}/{metric}": value.detach() for metric, value in made.metrics.items()}
        if metrics:  # copies: a metric may be a parameter, which the optimizer changes before metrics are read
            metrics = dict(zip(metrics, torch.stack(list(metrics.values())).unbind(), strict=True))
        total = torch.stack([loss * self._weight(state, name) for name, loss in losses.items()]).sum()
        raw = {f"loss/{name}": loss for name, loss in losses.items()}
        return State({**state.under(_SCALARS), **metrics, **raw, "loss": total}, state.layout)

    def after_step(self) -> None:
        """Updates the vocabulary head's twin, and calls ``after_step`` of the heads."""
        if self.momentum_vocabulary is not None:
            assert self.momentum is not None
            assert self.vocabulary is not None
            ema_update_(self.momentum_vocabulary, self.vocabulary, self.momentum.decay, self.local_storage)
        for head in self.heads.values():
            if isinstance(head, Head):
                head.after_step(self.gather)

    def discard_step(self) -> None:
        """Calls ``discard_step`` of the heads."""
        for head in self.heads.values():
            if isinstance(head, Head):
                head.discard_step()

    def _router(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Auxiliary losses of the routed layers and metrics of their routing, as means over layers and by layer.

        The sums of every layer are one vector in the state; one exchange adds all of them up over the replicas.
        """
        vectors = state.named("router")
        if not vectors:
            return {}, {}
        joined = self.gather.join(torch.cat(list(vectors.values()))[None]).sum(0)
        parts = dict(zip(vectors, torch.split(joined, [len(one) for one in vectors.values()]), strict=True))
        losses, alike = dict[str, Tensor](), list[RouterSums]()
        by_layer: dict[str, Tensor] = {}
        for place, layers in self.routing.alike(vectors).items():
            sums = RouterSums.unpack(torch.stack([parts[name] for name in layers]), len(MODALITIES))
            alike.append(sums)
            losses |= self.routing.of(place, sums)
            for figure, values in layer_health(sums).items():
                by_layer |= {f"{name}/{figure}": value for name, value in zip(layers, values.unbind(), strict=True)}
        health = mean_health([routing_health(sums, MODALITIES) for sums in alike], present_modalities(state.layout))
        return losses, {f"metric/router/{name}": value for name, value in (health | by_layer).items()}

    def _weight(self, state: State, name: str) -> Tensor | float:
        """The weight of a loss: a router's from the model, an objective's from the state."""
        return self.routing.weights[name] if name in self.routing.weights else state.get(f"weight/{name}", 1.0)


class RouterLosses:
    """The auxiliary losses of all routers: means over layers, separate for stacks whose fillings differ.

    Attributes:
        weights: Weights of the losses, by ``router/{loss}``, or ``router/{stack}/{loss}`` if fillings differ.
    """

    def __init__(self, fillings: Mapping[str, FeedForwardConfig]) -> None:
        """Chooses the names.

        Args:
            fillings: The feed-forward slots' fillings, by stack.
        """
        self._sparse = {stack: ffn for stack, ffn in fillings.items() if isinstance(ffn, SparseConfig)}
        alike = all(ffn == next(iter(self._sparse.values())) for ffn in self._sparse.values())
        self._place = {stack: "router/" if alike else f"router/{stack}/" for stack in self._sparse}
        self._allowed = {stack: ffn.allowed_experts(MODALITIES) for stack, ffn in self._sparse.items()}
        self.weights = {
            f"{self._place[stack]}{name}": weight
            for stack, ffn in self._sparse.items()
            for name, weight in ffn.router.losses.weights().items()
        }

    def alike(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Routed layers whose stacks have the same filling, by the beginning of their losses' names."""
        found: dict[str, list[str]] = {}
        for layer in layers:
            found.setdefault(self._place[stack_of(layer.partition("/")[0])], []).append(layer)
        return found

    def of(self, place: str, sums: RouterSums) -> dict[str, Tensor]:
        """The losses of layers with the same filling, fp32 scalars.

        Args:
            place: From ``alike``.
            sums: Of these layers, ``[L, ...]``.
        """
        stack = next(stack for stack, own in self._place.items() if own == place)
        losses = self._sparse[stack].router.losses.of(sums, MODALITIES, self._allowed[stack])
        return {f"{place}{name}": loss.mean() for name, loss in losses.items()}
