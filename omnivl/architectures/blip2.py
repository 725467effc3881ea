"""BLIP-2: a usually frozen visual tower, and a Q-Former whose learnt queries extract what texts describe.

In the second stage a frozen language model continues the queries with text.

Source: Li et al., BLIP-2, arXiv 2301.12597, and its released code (LAVIS).
Differs: the temperature is learnt as a logarithm. The vocabulary head is not tied to the word embedding. Similarities
    and matching use other replicas' features with their gradients; LAVIS gathers them without for similarities.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from moe.config import DenseConfig
from moe.ranges import Range
from omnivl.architectures.base import Architecture, Kit, Layers, widths_of
from omnivl.architectures.blip2_names import from_transformers, unmet_options
from omnivl.architectures.foreign import CLIP_PIXELS, read_json, read_pixels
from omnivl.architectures.misfits import divisions, language_misfits, stack_misfits, twin_misfits
from omnivl.chain.demands import CLEAN
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import TextInput
from omnivl.errors import Misfit, ModelError
from omnivl.parts.bert import TEXT_EPS
from omnivl.parts.language import LanguageModel, Prefix, language_layers, language_order
from omnivl.parts.losses import Losses
from omnivl.parts.opt_names import is_opt, language_from_opt, refuse_options_of_opt
from omnivl.parts.plain_vit import ImageBlock
from omnivl.parts.project import Project
from omnivl.parts.qformer import QFormerLayer
from omnivl.parts.queries import EmbedQuerying, JoinQueries, PoolQueries
from omnivl.parts.sizes import Patches, Transformer, Words
from omnivl.parts.vit import VisualBlock, VisualNorm


def _eva() -> Transformer:
    """EVA-CLIP's ViT-g without its last block."""
    return Transformer(hidden_size=1408, num_heads=16, layers=39, mlp_ratio=6144 / 1408)


def _bert() -> Transformer:
    return Transformer(norm="post", norm_eps=TEXT_EPS, dropout=0.1)


@dataclass(frozen=True)
class BLIP2(Architecture):
    """BLIP-2. The defaults are the paper's with ViT-g.

    Attributes:
        vision: The visual tower; a stage's ``freeze`` can keep it fixed.
        qformer: The Q-Former; its dropout also acts on its embeddings.
        num_queries: Learnt queries Q.
        cross_every: The first of every ``cross_every`` blocks of the Q-Former attends to visual features.
        words: Sizes of the texts.
        image_size: Side of an image, or of a frame of a clip, in pixels.
        num_frames: Frames of a training clip. Each is encoded as an image; the queries attend to all of them.
        patch_size: Side of a patch in pixels.
        projection_size: Size P of the contrastive embeddings.
        language: The language model of the second stage, which continues the queries; null for none.
    """

    kind: Literal["blip2"] = "blip2"
    vision: Transformer = field(default_factory=_eva)
    qformer: Transformer = field(default_factory=_bert)
    num_queries: Annotated[int, Range(1)] = 32
    cross_every: Annotated[int, Range(1)] = 2
    words: Words = field(default_factory=lambda: Words(length=32, vocab_size=30523))
    image_size: Annotated[int, Range(1)] = 224
    num_frames: Annotated[int, Range(1)] = 1
    patch_size: Annotated[int, Range(1)] = 14
    projection_size: Annotated[int, Range(1)] = 256
    language: LanguageModel | None = None

    streams: ClassVar[tuple[str, ...]] = ("visual", "queries", "text", "embedding", "fused", "generation", "language")
    vocabulary: ClassVar[tuple[str, ...]] = ("words", "vocab_size")
    readers: ClassVar[tuple[tuple[str, ...], ...]] = (("language",),)

    @property
    def offers(self) -> tuple[str, ...]:
        """The streams of the Q-Former, and that of the language model if there is one."""
        return tuple(stream for stream in super().offers if stream != "language" or self.language is not None)

    @property
    def inputs(self) -> InputSizes:
        """Sizes that the data side needs."""
        return InputSizes.of(self.patches, self.words.length, self.vision.hidden_size)

    @property
    def patches(self) -> Patches:
        """Sizes of the visual tower."""
        return Patches.of_images(self.image_size, self.patch_size, self.num_frames, **self.shown_as)

    @property
    def heads(self) -> HeadSizes:
        """Sizes for heads."""
        widths = dict.fromkeys(("queries", "text", "fused", "generation"), self.qformer.hidden_size)
        return HeadSizes(
            widths={**widths, "visual": self.vision.hidden_size},
            text_length=self.words.length,
            vocab_size=self.words.vocab_size,
            projection_size=self.projection_size,
            patch_size=self.patch_size,
            tubelet_size=1,
            image_size=self.image_size,
        )

    @property
    def stacks(self) -> Mapping[str, Transformer]:
        """The visual tower, the Q-Former, and the language model if there is one."""
        written = {} if self.language is None else {"language": self.language.blocks}
        return {"visual": self.vision, "qformer": self.qformer, **written}

    @property
    def text_inputs(self) -> Mapping[str, TextInput]:
        """The text input of the language model."""
        return {} if self.language is None else {"language": self.language.text_input}

    @property
    def widths(self) -> Mapping[str, object]:
        """Sizes that weights of an earlier stage must share, by field."""
        found = {name: getattr(self, name) for name in ("num_queries", "cross_every", "patch_size", "projection_size")}
        found |= {
            **widths_of({"vision": self.vision, "qformer": self.qformer}),
            "words.vocab_size": self.words.vocab_size,
        }
        if self.language is not None:
            found |= widths_of({"language.blocks": self.language.blocks})
            found["language.vocab_size"] = self.language.vocab_size
        return found

    def layers(self, kit: Kit) -> Layers:
        """Tower, Q-Former, projections, heads."""
        vision, qformer, patches, count = self.vision, self.qformer, self.patches, self.num_queries
        dtype = kit.compute_dtype
        seen = {"queries": count, "cross_every": self.cross_every, "memory_size": vision.hidden_size}
        yield "embed", EmbedQuerying(patches, vision, self.words, qformer, count, kit.tokens.pad, dtype)
        for index in range(vision.layers):
            yield f"visual_{index:02d}", VisualBlock(index, vision, patches, block=ImageBlock, may_shorten=False)
        yield "visual_norm", VisualNorm(vision)
        for index in range(qformer.layers):
            yield f"qformer_{index:02d}", QFormerLayer(index, qformer, patches, length=self.words.length, **seen)
        # A picture's queries are projected, each to a separate embedding.
        sizes = replace(self.heads, widths={**self.heads.widths, "visual": qformer.hidden_size})
        pools = {"visual": _queries}
        yield "contrast", Project(sizes, kit.objectives, joins_inputs=True, pools=pools, several=("visual",))
        yield "join", JoinQueries(kit.objectives, kit.gather, qformer.dropout)
        yield "pool", PoolQueries(count)
        if self.language is not None:
            prefix = Prefix(qformer.hidden_size, count, self.language.blocks.hidden_size)
            yield from language_layers(self.language, prefix, dtype)
        yield "losses", Losses(self.heads, kit.objectives, kit.gather, fillings=self.fillings)

    def order(self, names: Sequence[str]) -> Sequence[str]:
        """The Q-Former runs twice, before and after the join; the language model's embedding is also its head."""
        blocks = [name for name in names if name.startswith("qformer_")]
        behind = list(names).index("join") + 1
        order = [*names[:behind], *blocks, *names[behind:]]
        return order if self.language is None else language_order(order)

    def from_foreign(self, weights: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor] | None:
        """Weights of transformers' classes of BLIP-2, of BERT, which the Q-Former starts from, or of OPT.

        Raises:
            ModelError: The folder's configuration asks for other options than the model has.
        """
        config = read_json(path / "config.json") if path.is_dir() else {}
        said = config if is_opt(weights) else config.get("text_config", {})
        if self.language is not None and said.get("model_type", "opt") == "opt":
            refuse_options_of_opt(said, self.language, path)
        if is_opt(weights):
            return language_from_opt(weights)
        pixels = read_pixels(path if path.is_dir() else path.parent, CLIP_PIXELS)
        found = from_transformers(weights, pixels, self.qformer.layers)
        if found is not None and (unmet := unmet_options(config, self.vision, self.qformer, self.cross_every)):
            raise ModelError("\n".join(f"{path}: {line}; set it, or give other weights" for line in unmet))
        return found

    def misfits(self) -> Iterator[Misfit]:
        """Options that do not fit together."""
        yield from super().misfits()
        stacks = {"vision": self.vision, "qformer": self.qformer}
        yield from divisions({"image_size": (self.image_size, "patch_size", self.patch_size)})
        for (name, stack), norm in zip(stacks.items(), ("pre", "post"), strict=True):
            yield from stack_misfits(name, stack)
            if stack.norm != norm:
                yield Misfit((name, "norm"), repr(stack.norm), f"{norm!r} there", f"set it to {norm!r}")
            if not isinstance(stack.ffn, DenseConfig):
                got, change = f"{stack.ffn.kind!r}", "set it to 'dense', or change model.kind"
                yield Misfit((name, "ffn", "kind"), got, "'dense' in 'blip2'", change)
        for option, still in (("activation", "gelu"), ("drop_path", 0.0), ("layer_scale_init", None)):
            if (value := getattr(self.qformer, option)) != still:
                allowed = "null" if still is None else repr(still)
                yield Misfit(("qformer", option), repr(value), f"{allowed} there", f"set it to {allowed}")
        if self.words.length < 3:
            yield Misfit(("words", "length"), str(self.words.length), "3 or more: [CLS] word [SEP]", "raise it")
        if not self.words.norm_embeddings:
            yield Misfit(("words", "norm_embeddings"), "false", "true in 'blip2'", "set it to true")
        if self.language is not None:
            yield from language_misfits(self.language, self.num_queries)
        yield from twin_misfits(self.kind, self.momentum)


def _queries(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The final queries, ``[B, Q, D]``, in place of the visual tower's features."""
    return state["queries"]
