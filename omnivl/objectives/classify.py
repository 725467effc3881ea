"""Classification by names: pictures and clips are compared with all names of a list in every step.

In-batch contrast sees the names of one batch at a time; here a picture is told from every other name of the list, which
the text encoder embeds anew in each step. That pays where names are short and the text encoder is cheap: N texts per
replica and micro-batch go through it, whatever the batch is.

The projections and the temperature belong to the layer that makes the embeddings (``omnivl.parts.project``).

Shapes: B samples of this replica, N names, L token positions, P projection size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.demands import Demands, embedding_of
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, Temperature, replica_mean
from omnivl.chain.positions import IGNORED
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, visual_of
from omnivl.data.fields import Field
from omnivl.data.lists import EMBEDDED_LISTS, embedded_list
from omnivl.data.sizes import InputSizes
from omnivl.data.templates import filled, unknown_places
from omnivl.data.tokenizer import TextReader
from omnivl.errors import Misfit
from omnivl.objectives.text_lists import read_list
from omnivl.parts.similarity import similarity

_NAME = "name"
"""The place of a name in a prompt."""
_CACHED = 8
"""Lists of token ids that a process keeps."""


@dataclass(frozen=True)
class Classify(Objective):
    """Which of a list of names does the picture or clip show?

    A field of the sample holds its name. Samples whose name is not in the list are left out and not counted.

    Attributes:
        names: The list, the path of a text file with a name on each line, or one of the embedded lists: ``emoji``
            (names of the drawings), ``emoji_labels`` (their classes), ``motions``.
        field: Field of a sample that holds its name.
        prompt: What the text encoder reads for a name; ``{name}`` is its place.
        label_smoothing: Share of the target's probability that is spread over all names.
        temperature: Initial temperature; it is learnt within ``temperature_bounds``, and shared by all objectives that
            compare embeddings.
        temperature_bounds: Smallest and largest temperature.
        learn_temperature: Whether the temperature is learnt.

    Source: Radford et al., CLIP, arXiv 2103.00020, section 3.1.2: a text encoder makes the weights of a linear
        classifier from names. Differs: here this classifier is trained.
    """

    kind: Literal["classify"] = "classify"
    names: str | tuple[str, ...] = ()
    field: str = "name"
    prompt: str = "{name}"
    label_smoothing: float = 0.0
    temperature: float = 0.07
    temperature_bounds: tuple[float, float] = (0.001, 0.5)
    learn_temperature: bool = True

    def __post_init__(self) -> None:
        """Checks the options and reads the list.

        Raises:
            UserError: An option is out of its range, or the list cannot be read.
        """
        super().__post_init__()
        self.require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", "at least 0 and below 1")
        fits = "{name}" in self.prompt and not unknown_places(self.prompt, (_NAME,))
        self.require(fits, "prompt", "a text with {name} in it, and nothing else in braces")
        if self.names not in EMBEDDED_LISTS:
            object.__setattr__(self, "names", read_list(self.names, f"objective {self.key}", "names"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return embedded_list(self.names) if isinstance(self.names, str) else self.names

    @property
    def texts(self) -> str:
        """Name of the text segment that holds the names."""
        return f"{self.key}/names"

    @property
    def temperature_options(self) -> Temperature:
        """The temperature's options."""
        return Temperature(self.temperature, self.temperature_bounds, self.learn_temperature)

    def after_training(self) -> Self:
        """The same with the names themselves, which an exported model has no file for."""
        return replace(self.apart(), names=self.choices)

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """The name."""
        return {self.field: Field("text")}

    def prompt_of(self, labels: Sequence[str]) -> str | None:
        """The prompt, if all labels are in the list."""
        return self.prompt.replace("{name}", "{label}") if _places(self.choices).keys() >= set(labels) else None

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """A list with fewer than two names."""
        if len(self.choices) < 2:
            got = f"{len(self.choices)} names"
            yield Misfit(("names",), got, "two or more", "give a list, or the path of a file that holds it")

    @property
    def needs_whole_texts(self) -> bool:
        """The names are texts of their own."""
        return True

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The embedding of the picture or clip, and one text row for each name."""
        if visual_of(kind) not in ("image", "clip"):
            return None
        rows = {"text": {self.texts: len(self.choices)}}
        return Demands(rows=rows, reads=frozenset({"visual_embedding", "logit_scale", embedding_of(self.texts)}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/names/token_ids``, int64 ``[N, L]``, and ``{key}/targets``, int64 ``[B]``."""
        places = _places(self.choices)
        named = [places.get(str(name), IGNORED) for name in batch.fields[self.field]]
        ids = _token_ids(self.choices, self.prompt, context.readers["text"])
        return {f"{self.texts}/token_ids": ids, f"{self.key}/targets": torch.tensor(named, dtype=torch.int64)}

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The samples whose name is in the list."""
        return {self.key: (state[f"{self.key}/targets"] != IGNORED).sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Cross-entropy over all names, mean over the samples whose name is in the list.

        Metrics: ``accuracy``, of these samples of this replica; ``named``, their share; ``temperature``.
        """
        targets, scale = state[f"{self.key}/targets"], state["logit_scale"]
        logits = scale * similarity(state["visual_embedding"], state[embedding_of(self.texts)])
        total = F.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        named = targets != IGNORED
        loss = replica_mean(total, named.sum(), gather, state.term_weight(self.key))
        with torch.no_grad():
            right = (logits.argmax(-1) == targets).sum() / named.sum().clamp(min=1)
            metrics = {"accuracy": right, "named": named.float().mean(), "temperature": 1.0 / scale}
        return ObjectiveLoss(loss, metrics)


@lru_cache(_CACHED)
def _places(names: tuple[str, ...]) -> Mapping[str, int]:
    return {name: place for place, name in enumerate(names)}


@lru_cache(_CACHED)
def _token_ids(names: tuple[str, ...], prompt: str, reader: TextReader) -> Tensor:
    """int64 ``[N, L]``. Kept, since it is the same in every step."""
    return torch.from_numpy(reader.encode([filled(prompt, {_NAME: name}) for name in names]))
