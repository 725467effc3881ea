"""The last layer: owns the heads, computes every active objective's loss and adds them up.

Shapes: R alignment rows, B samples, L text positions, V vocabulary size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe.config import SparseConfig
from moe.health import layer_health, mean_health, routing_health
from moe.router_losses import RouterSums, loss_weights, router_losses
from moe.sparse import allowed_experts
from omnivl.chain.chain import ChainLayer
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.layout import present_modalities
from omnivl.chain.objective import Objective
from omnivl.chain.state import State, StepLayout
from omnivl.objectives.vlm import MatchHead
from omnivl.objectives.vocabulary import VocabularyHead
from omnivl.parts.config import MODALITIES, ModelConfig

_SCALARS = ("loss", "metric")


class Losses(ChainLayer):
    """Heads and losses.

    In training, ``loss/{name}`` and ``metric/{name}/{metric}`` of every active objective and ``loss``, the sum of
    ``weight/{name}`` (from the state; 1 where it is not there) times ``loss/{name}``. Routed layers add
    ``loss/router/{name}``, weighted as the model says, and ``metric/router/{metric}``. Streams end here: only losses
    and metrics leave.

    To match, ``match/logits`` fp32 ``[R]``: log odds of "match". To generate, ``generate/logits`` fp32 ``[B, V]``
    behind the stream's last position.
    """

    def __init__(self, config: ModelConfig, objectives: Sequence[Objective], gather: Gather | None = None) -> None:
        """Builds the heads that ``objectives`` need, the vocabulary head once for all."""
        super().__init__()
        self.gather: Gather = LocalGather() if gather is None else gather
        self.ffn = config.ffn
        self.router_weights: Mapping[str, float] = {}
        self.allowed: Sequence[Sequence[bool]] | None = None
        if isinstance(config.ffn, SparseConfig):
            self.router_weights = loss_weights(config.ffn.losses)
            self.allowed = allowed_experts(config.ffn, MODALITIES)
        self.objectives = {objective.name: objective for objective in objectives}
        self.vocabulary: VocabularyHead | None = None
        if any(objective.uses_vocabulary_head for objective in objectives):
            self.vocabulary = VocabularyHead(config.hidden_size, config.vocab_size)
        built = {name: objective.build_head(config) for name, objective in self.objectives.items()}
        self.heads = nn.ModuleDict({name: head for name, head in built.items() if head is not None})

    def head_of(self, objective: Objective) -> nn.Module | None:
        """The head that ``objective.loss`` gets."""
        own: nn.Module | None = dict(self.heads.items()).get(objective.name)
        if not objective.uses_vocabulary_head:
            return own
        assert self.vocabulary is not None
        return self.vocabulary if own is None else nn.ModuleDict({"own": own, "vocabulary": self.vocabulary})

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The vocabulary head where no step restores or writes words."""
        if self.vocabulary is not None and not any(one.generation or one.text.keys() - {"clean"} for one in layouts):
            yield from self.vocabulary.parameters()

    def forward(self, state: State) -> State:
        """See the class."""
        mode = state.layout.mode
        if mode == "match":
            return state.merged({"match/logits": self._match(state)})
        if mode == "generate":
            return state.merged({"generate/logits": self._next_token(state)})
        return self._train(state) if mode == "train" else state

    def _train(self, state: State) -> State:
        assert state.layout.objectives, f"no objective acts on {state.layout.kind}"
        losses, metrics = self._router(state)
        for name in state.layout.objectives:
            objective = self.objectives[name]
            made = objective.loss(state, self.head_of(objective), self.gather)
            assert made.loss.dtype == torch.float32, f"{name} computes its loss in {made.loss.dtype}"
            losses[name] = made.loss
            metrics |= {f"metric/{name}/{metric}": value.detach() for metric, value in made.metrics.items()}
        total = torch.stack([loss * self._weight(state, name) for name, loss in losses.items()]).sum()
        ended = {name: tensor for name, tensor in state.items() if name.split("/")[0] in _SCALARS}
        raw = {f"loss/{name}": loss for name, loss in losses.items()}
        return State({**ended, **metrics, **raw, "loss": total}, state.layout)

    def _router(self, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Auxiliary losses of the routed layers and the health of their routing, as means over layers and by layer.

        Every layer has left its sums as one vector; all of them cross the replicas in one exchange.
        """
        vectors = state.named("router")
        if not vectors:
            return {}, {}
        assert isinstance(self.ffn, SparseConfig)
        joined = self.gather.join(torch.cat(list(vectors.values()))[None]).sum(0)
        parts = torch.split(joined, [len(vector) for vector in vectors.values()])
        layers = [RouterSums.unpack(part, len(MODALITIES)) for part in parts]
        losses = [router_losses(sums, MODALITIES, self.ffn.losses, self.allowed) for sums in layers]
        present = present_modalities(state.layout)
        health = mean_health([routing_health(sums, MODALITIES, self.ffn.top_k) for sums in layers], present)
        for layer, sums in zip(vectors, layers, strict=True):
            health |= {f"{layer}/{figure}": value for figure, value in layer_health(sums, self.ffn.top_k).items()}
        return (
            {f"router/{name}": torch.stack([one[name] for one in losses]).mean() for name in losses[0]},
            {f"metric/router/{name}": value for name, value in health.items()},
        )

    def _weight(self, state: State, name: str) -> Tensor | float:
        """The weight of a loss: a router's from the model, an objective's from the state."""
        kind, _, loss = name.partition("/")
        return self.router_weights[loss] if kind == "router" else state.get(f"weight/{name}", 1.0)

    def _match(self, state: State) -> Tensor:
        assert "vlm" in self.heads, "matching needs the head of the vlm objective"
        head = self.heads["vlm"]
        assert isinstance(head, MatchHead)
        logits = head(state["alignment"][:, 0])
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds

    def _next_token(self, state: State) -> Tensor:
        assert self.vocabulary is not None, "generation needs the vocabulary head of the lm objective"
        logits: Tensor = self.vocabulary(state["generation"][:, -1])
        return logits
