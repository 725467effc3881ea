"""What a model's architecture forces in its routing, whatever the routers have learnt; readers are told so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe.config import MoMELIMoEConfig
from omnivl.architectures import Architecture
from omnivl.chain.names import stack_of


@dataclass(frozen=True)
class Forced:
    """What is not the routers' choice.

    Attributes:
        allowed: By layer and modality, which experts its tokens may go to; a layer that is not named allows all.
        even: Layers whose experts choose their tokens, so that all take equally many.
    """

    allowed: Mapping[str, Mapping[str, tuple[bool, ...]]] = field(default_factory=dict)
    even: frozenset[str] = frozenset()

    def may(self, layer: str, modality: str, expert: int) -> bool:
        """Whether a modality's tokens may go to an expert."""
        row = self.allowed.get(layer, {}).get(modality)
        return row is None or row[expert]


def forced_by(model: Architecture, tokens: Any) -> Forced:
    """What an architecture forces in the layers and for the modalities of a table of routed tokens."""
    modalities = list(map(str, tokens["modality"].cat.categories))
    allowed, even = {}, set()
    for layer in tokens["layer"].cat.categories:
        ffn = model.sparse[stack_of(layer.partition("/")[0])]
        if isinstance(ffn, MoMELIMoEConfig) and (rows := ffn.allowed_experts(modalities)) is not None:
            allowed[layer] = {name: tuple(row) for name, row in zip(modalities, rows, strict=True)}
        if not ffn.router.tokens_choose:
            even.add(layer)
    return Forced(allowed, frozenset(even))


def told(tokens: Any, num_experts: Mapping[str, int], forced: Forced) -> list[str]:
    """A sentence for everything that is forced."""
    found = []
    for layer, count in num_experts.items():
        passing = modalities_of(tokens, layer)
        if len(passing) == 1:
            found.append(f"{layer}: only {passing[0]} tokens pass, so that every choice is of {passing[0]}.")
        if count == 1:
            found.append(f"{layer}: there is one expert for all tokens.")
        for modality in passing:
            own = [expert for expert in range(count) if forced.may(layer, modality, expert)]
            if len(own) < count:
                found.append(f"{layer}: {modality} tokens may go to {experts_said(own)} of {count} only.")
        if layer in forced.even:
            found.append(f"{layer}: experts choose their tokens, equally many each; loads are equal, and none is idle.")
    return found


def idle(tokens: Any, num_experts: Mapping[str, int], forced: Forced) -> list[str]:
    """A sentence for each layer about the experts that got no token, or hardly any."""
    found = []
    for layer, count in num_experts.items():
        choices = tokens[tokens["layer"] == layer]["expert"].value_counts().reindex(range(count), fill_value=0)
        passing = modalities_of(tokens, layer)
        apart = [one for one in range(count) if not any(forced.may(layer, modality, one) for modality in passing)]
        dead = [one for one in range(count) if choices[one] == 0 and one not in apart]
        few = choices.sum() / count / 10
        rare = [one for one in range(count) if 0 < choices[one] < few]
        said = f"{layer}: {experts_said(dead)} of {count} got no token." if dead else f"{layer}: no expert is idle."
        if rare:
            said += f" Less than a tenth of an even share went to {experts_said(rare)}."
        if apart:
            said += f" Other modalities than these samples' belong to {experts_said(apart)}."
        found.append(said)
    return found


def modalities_of(tokens: Any, layer: str) -> list[str]:
    """The modalities whose tokens pass a layer."""
    return sorted(map(str, tokens[tokens["layer"] == layer]["modality"].unique()))


def experts_said(experts: list[int]) -> str:
    """``expert 3``, ``experts 1, 3 to 6``."""
    runs: list[list[int]] = []
    for one in experts:
        if runs and runs[-1][1] == one - 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"expert{'' if len(experts) == 1 else 's'} {', '.join(words) or 'none'}"
