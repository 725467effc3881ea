"""The text of a sample, and whether its picture may be mirrored without making the text wrong."""

import re
from collections.abc import Sequence

import numpy as np

from omnivl.data.batch import has_text, is_label
from omnivl.data.config import DataEntryConfig
from omnivl.data.fields import field_value
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.data.templates import filled
from omnivl.randomness import stable_hash

_DIRECTIONS: dict[str, str] = {
    "en": "left|right|leftwards?|rightwards?|(?:anti|counter)?-?clockwise|east|west|eastern|western",
    "de": "links|rechts|linke[rsnm]?|rechte[rsnm]?|ost(?:en)?|west(?:en)?",
    "fr": "gauche|droite?|est|ouest",
    "es": "izquierd[ao]s?|derech[ao]s?|este|oeste",
    "it": "sinistr[aoe]|destr[aoe]|est|ovest",
    "pt": "esquerd[ao]s?|direit[ao]s?|leste|oeste",
    "nl": "links|rechts|linker|rechter|oost|west",
}
_PATTERNS = {
    language: re.compile(rf"(?<![^\W_])(?:{words})(?![^\W_])", re.IGNORECASE) for language, words in _DIRECTIONS.items()
}


def sample_texts(sample: Sample, config: DataEntryConfig) -> tuple[str, ...]:
    """The texts from which an entry chooses: the captions, or those in the field that it names.

    Raises:
        BadSampleError: ``wrong_field``: the field holds no text.
    """
    if config.text is None:
        return sample.captions
    value = field_value(sample, config.text)
    texts: list[str] = []
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(one, str):
            detail = f"{config.text!r} is {one!r}; allowed: a text or a list of texts"
            raise BadSampleError("wrong_field", sample.where, detail)
        texts.append(one.strip())
    return tuple(text for text in texts if text)


def choose_text(sample: Sample, config: DataEntryConfig, random: np.random.Generator | None = None) -> str | None:
    """The text that goes with the sample; None where the kind has none.

    Args:
        sample: With texts for kinds with a text, with a label for label kinds.
        config: Caption policy or prompts.
        random: The sample's generator; None for evaluation: the first caption, the first prompt.

    Raises:
        BadSampleError: ``missing_caption``, ``missing_label`` or ``wrong_field``.
    """
    if not has_text(config.kind):
        return None
    if is_label(config.kind):
        if sample.label is None:
            raise BadSampleError("missing_label", sample.where, f"kind {config.kind} needs a label")
        return filled(_drawn(config.prompts, random), {"label": sample.label})
    captions = sample_texts(sample, config)
    if not captions:
        needed = "a caption" if config.text is None else f"a text in {config.text!r}"
        raise BadSampleError("missing_caption", sample.where, f"kind {config.kind} needs {needed}")
    if config.caption == "join":
        order = range(len(captions)) if random is None else random.permutation(len(captions)).tolist()
        return ", ".join(captions[place] for place in order)
    return _drawn(captions, random) if config.caption == "random" else captions[0]


def _drawn(texts: Sequence[str], random: np.random.Generator | None) -> str:
    """One of the texts; without a generator the first."""
    return texts[0 if random is None or len(texts) == 1 else int(random.integers(len(texts)))]


def may_flip(text: str, language: str = "en") -> bool:
    """Whether a mirrored picture fits the text: it names no direction. Unknown languages are never flipped."""
    pattern = _PATTERNS.get(language)
    return pattern is not None and pattern.search(text) is None


def sample_identity(sample: Sample, config: DataEntryConfig) -> int:
    """UniVLC's y, a non-negative 63-bit integer.

    Label kinds: equal for all samples of a class, stills and clips of one source alike. Other kinds: a hash of the
    concept that the sample names, else of its first caption, whichever caption is used, else of its own name.
    """
    if is_label(config.kind):
        return stable_hash("class", config.source, sample.label or "")
    if sample.identity is not None:
        return stable_hash("concept", sample.identity)
    texts = sample_texts(sample, config)
    if not texts:
        return stable_hash("sample", config.source, sample.key)
    return stable_hash("caption", " ".join(texts[0].casefold().split()))
