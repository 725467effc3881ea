"""The configuration of an exported model: what its ``config.json`` says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PretrainedConfig

from moe.upgrades import upgraded as upgraded_ffn
from omnivl.architectures import Architecture, ArchitectureConfig, OmniVL
from omnivl.architectures.upgrades import upgraded
from omnivl.chain.objective import temperature_of
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.objectives import LM, MLM, VLM, Objective, UniVLC

HEADS: Mapping[str, type[Objective]] = {"mlm": MLM, "vlm": VLM, "lm": LM}
"""Objectives whose heads are of use after training."""


class OmniVLConfig(PretrainedConfig):
    """What is needed beside the weights to build a model.

    Attributes:
        model: The fields of the architecture, ``kind`` among them, without momentum.
        heads: Which of ``HEADS`` there are; ``vlm`` matches, ``lm`` writes captions.
        special_tokens: The fields of ``SpecialTokens``.
        temperature_bounds: Smallest and largest value of the learnt temperature.
    """

    model_type = "omnivl"

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        heads: Sequence[str] = (),
        special_tokens: Mapping[str, int] | None = None,
        temperature_bounds: Sequence[float] = UniVLC.temperature_bounds,
        **kwargs: Any,
    ) -> None:
        """Takes plain containers, as JSON has them. Without arguments: the ``base`` preset with BERT's vocabulary."""
        self.model = dict(model) if model is not None else _plain(replace(OmniVL(), momentum=None))
        self.heads = list(heads)
        self.special_tokens = dict(special_tokens) if special_tokens is not None else asdict(_BERT)
        self.temperature_bounds = list(temperature_bounds)
        super().__init__(**kwargs)

    @classmethod
    def of(cls, model: Architecture, objectives: Sequence[Objective], tokens: SpecialTokens) -> "OmniVLConfig":
        """The configuration of a stage's model.

        Args:
            model: Of the stage.
            objectives: Of the stage.
            tokens: Of its tokenizer.
        """
        trained = {objective.key: objective for objective in objectives}
        return cls(
            model=_plain(replace(model.portable(), momentum=None)),
            heads=[name for name in HEADS if name in trained],
            special_tokens=asdict(tokens),
            temperature_bounds=temperature_of(objectives).bounds,
        )

    @property
    def sizes(self) -> Architecture:
        """``model``, typed.

        Raises:
            ModelError: A field is unknown or of a wrong type.
        """
        model = upgraded(self.model, "omnivl")
        model = {"kind": "omnivl", **model}
        if isinstance(ffn := model.get("ffn"), Mapping):
            model["ffn"] = upgraded_ffn(ffn)
        return _typed(json.dumps(model, sort_keys=True))

    @property
    def tokens(self) -> SpecialTokens:
        """``special_tokens``, typed."""
        return SpecialTokens(**self.special_tokens)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives whose heads the model has; what only trains (momentum, a queue) is left out.

        Raises:
            ModelError: A head is unknown.
        """
        if unknown := [name for name in self.heads if name not in HEADS]:
            raise ModelError(f"config.json: heads: got {unknown}; allowed are {', '.join(HEADS)}; take the others out")
        low, high = self.temperature_bounds
        start = min(max(UniVLC.temperature, low), high)  # replaced by the learnt one
        univlc = UniVLC(temperature=start, temperature_bounds=(low, high))
        return (univlc, *(HEADS[name]() for name in self.heads))


_BERT = SpecialTokens(pad=0, cls=101, sep=102, mask=103, decode=1, vocab_size=30522, num_reserved=999)


def _plain(model: Architecture) -> dict[str, Any]:
    """A configuration in the containers that JSON has, so that it equals what is read back."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(model))))


@lru_cache(maxsize=8)
def _typed(model: str) -> Architecture:
    try:
        (read,) = TypeAdapter(tuple[ArchitectureConfig], config=ConfigDict(extra="forbid")).validate_json(f"[{model}]")
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'][2:]))}: {one['msg']}" for one in error.errors())
        raise ModelError(
            f"config.json: model: {problems}; allowed are the fields of the plan's model section; export the model "
            "with this version of the package"
        ) from error
    return read
