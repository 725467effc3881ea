"""What a plan can ask to be evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Where = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class BaselineReference:
    """The pictures that the 16x16-pixel baseline compares against.

    Attributes:
        source: Data source of the reference pictures.
        media: Whether they are stills or clips.
        where: Metadata filter, e.g. ``{style: [fluent]}``.
        max_samples: Upper bound, for sources without an end.
    """

    source: str = "emoji"
    media: Literal["image", "video"] = "image"
    where: Where = field(default_factory=dict)
    max_samples: int = 4096


@dataclass(frozen=True)
class RetrievalTask:
    """Retrieval in both directions between pictures or clips and texts, with R@1, R@5 and R@10.

    Attributes:
        kind: ``retrieval``.
        name: Heads the rows of the table.
        source: Data source.
        media: ``image`` or ``video``.
        where: Metadata filter of the pictures.
        text: ``caption``: the first caption of each picture; ``tags``: every tag that at least ``min_tagged`` pictures
            have, each relevant to all of these.
        min_tagged: See ``text``.
        rerank: Re-rank this many contrastive candidates with the alignment decoder and report both; 0 does not.
        rerank_temperature: Divides the cosine before the matching log odds are added to it.
        max_samples: Upper bound on the number of pictures.
        baseline: Reference of the pixel baseline; null prints none. Needs ``text: caption``.
        gallery: Number of queries to keep for the report.
    """

    kind: Literal["retrieval"] = "retrieval"
    name: str = "retrieval"
    source: str = "emoji"
    media: Literal["image", "video"] = "image"
    where: Where = field(default_factory=dict)
    text: Literal["caption", "tags"] = "caption"
    min_tagged: int = 2
    rerank: int = 0
    rerank_temperature: float = 0.07
    max_samples: int = 4096
    baseline: BaselineReference | None = None
    gallery: int = 0


@dataclass(frozen=True)
class ZeroShotTask:
    """Zero-shot classification: the class whose prompts lie nearest. On ``motion`` clips this is motion recognition.

    Attributes:
        kind: ``zero_shot``.
        name: Heads the rows of the table.
        source: Data source.
        media: ``image`` or ``video``.
        where: Metadata filter.
        prompts: Templates with ``{label}``, averaged in embedding space (Source: CLIP, arXiv 2103.00020, 3.1.4). A
            template may hold ``{name}``, the sample's own name: each sample then has class texts of its own.
        max_samples: Upper bound on the number of samples.
        baseline: Reference of the nearest-neighbour pixel baseline; null prints none.
    """

    kind: Literal["zero_shot"] = "zero_shot"
    name: str = "zero_shot"
    source: str = "emoji"
    media: Literal["image", "video"] = "image"
    where: Where = field(default_factory=dict)
    prompts: tuple[str, ...] = ("{label}",)
    max_samples: int = 4096
    baseline: BaselineReference | None = None


@dataclass(frozen=True)
class CaptionTask:
    """Captions by the generation decoder: exact match, keyword F1 and BLEU.

    Attributes:
        kind: ``caption``.
        name: Heads the rows of the table.
        source: Data source.
        media: ``image`` or ``video``.
        where: Metadata filter.
        num_beams: 1 decodes greedily.
        max_samples: Upper bound on the number of samples.
        gallery: Number of captions to keep for the report.
    """

    kind: Literal["caption"] = "caption"
    name: str = "caption"
    source: str = "emoji"
    media: Literal["image", "video"] = "image"
    where: Where = field(default_factory=dict)
    num_beams: int = 1
    max_samples: int = 512
    gallery: int = 12


@dataclass(frozen=True)
class RoutingTask:
    """How the routers of sparse experts choose: experts used, entropy and drops by modality, and a page of it.

    The page and a table of all routed tokens are written beside the results. Needs ``model.ffn`` of kind ``limoe`` or
    ``mome_limoe``.

    Attributes:
        kind: ``routing``.
        name: Heads the rows of the table.
        source: Data source.
        media: ``image`` or ``video``.
        where: Metadata filter.
        max_samples: Upper bound on the number of pictures or clips, each with its first caption.
    """

    kind: Literal["routing"] = "routing"
    name: str = "routing"
    source: str = "emoji"
    media: Literal["image", "video"] = "image"
    where: Where = field(default_factory=dict)
    max_samples: int = 512


TaskConfig = Annotated[RetrievalTask | ZeroShotTask | CaptionTask | RoutingTask, Field(discriminator="kind")]
"""Union of everything that ``evaluate.tasks`` may hold."""
