"""The configuration of an exported model, its ``config.json``."""

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
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import ModelError
from omnivl.objectives import Objective, ObjectiveConfig, UniVLC


class OmniVLConfig(PretrainedConfig):
    """Everything that is needed besides the weights to build a model.

    Attributes:
        model: The fields of the architecture, including ``kind``, without momentum.
        heads: The objectives whose heads the model has, each with its fields or as its kind alone.
        special_tokens: The fields of ``SpecialTokens``.
    """

    model_type = "omnivl"

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        heads: Sequence[str | Mapping[str, Any]] = (),
        special_tokens: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the containers of JSON. Without arguments: the ``base`` preset with BERT's vocabulary."""
        self.model = dict(model) if model is not None else _plain(replace(OmniVL(), momentum=None))
        self.heads = [dict(head) if isinstance(head, Mapping) else {"kind": head} for head in heads]
        if bounds := kwargs.pop("temperature_bounds", None):
            # Older folders have only the temperature bounds of the contrastive objective.
            start = min(max(UniVLC.temperature, bounds[0]), bounds[1])  # replaced by the learnt one
            self.heads.insert(0, {"kind": "univlc", "temperature": start, "temperature_bounds": list(bounds)})
        self.special_tokens = dict(special_tokens) if special_tokens is not None else asdict(_BERT)
        super().__init__(**kwargs)

    @classmethod
    def of(cls, model: Architecture, objectives: Sequence[Objective], tokens: SpecialTokens) -> "OmniVLConfig":
        """The configuration of a stage's model.

        Args:
            model: Architecture of the stage.
            objectives: Objectives of the stage.
            tokens: Special tokens of its tokenizer.
        """
        kept = [one for objective in objectives if (one := objective.after_training()) is not None]
        return cls(
            model=_plain(replace(model.portable(), momentum=None)),
            heads=[_plain(one) for one in kept],
            special_tokens=asdict(tokens),
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
        return _sizes(json.dumps(model, sort_keys=True))

    @property
    def tokens(self) -> SpecialTokens:
        """``special_tokens``, typed."""
        return SpecialTokens(**self.special_tokens)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """``heads``, typed.

        Raises:
            ModelError: A head has an unknown kind or field.
        """
        return _objectives(json.dumps(self.heads, sort_keys=True))


_BERT = SpecialTokens(pad=0, cls=101, sep=102, mask=103, decode=1, vocab_size=30522, num_reserved=999)


def _plain(described: Architecture | Objective) -> dict[str, Any]:
    """A configuration in the containers of JSON, so that it equals the one that is read back."""
    return cast(dict[str, Any], json.loads(json.dumps(asdict(described))))


@lru_cache(maxsize=8)
def _sizes(model: str) -> Architecture:
    (read,) = _read(tuple[ArchitectureConfig], "model", "the plan's model section", f"[{model}]")
    return cast(Architecture, read)


@lru_cache(maxsize=8)
def _objectives(heads: str) -> tuple[Objective, ...]:
    allowed = "an objective of a plan"
    return cast(tuple[Objective, ...], _read(tuple[ObjectiveConfig, ...], "heads", allowed, heads))


def _read(of: Any, section: str, allowed: str, found: str) -> tuple[object, ...]:
    """A section of a configuration, typed.

    Raises:
        ModelError: A field is unknown or of a wrong type.
    """
    try:
        read: tuple[object, ...] = TypeAdapter(of, config=ConfigDict(extra="forbid")).validate_json(found)
    except ValidationError as error:
        places = [".".join(map(str, one["loc"][2:])) for one in error.errors()]
        told = zip(places, error.errors(), strict=True)
        problems = "; ".join(f"{place}: {one['msg']}" if place else one["msg"] for place, one in told)
        raise ModelError(
            f"config.json: {section}: {problems}; allowed are the fields of {allowed}; export the model with this "
            "version of the package"
        ) from error
    return read
