"""A trained stage that encodes, classifies, describes and searches what a program gives it.

It calls what the commands ``embed``, ``evaluate`` and ``routing`` call, so that both give the same values.

Shapes: N pictures, clips or texts, M embeddings of a picture (architectures that make several of each), P projection
size.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from omnivl.api.given import check_words, is_embedding, picture_sets
from omnivl.api.routing import Routing, routing_of
from omnivl.data.sizes import InputSizes
from omnivl.data.templates import unknown_places
from omnivl.errors import UserError
from omnivl.inference.draw import kept_outside
from omnivl.inference.encoder import Encoder
from omnivl.inference.given import Clip, Picture, each_picture, given_texts
from omnivl.inference.pictures import Media, PictureSet
from omnivl.objectives.diffusion import Diffusion
from omnivl.parts.project import Project
from omnivl.parts.similarity import similarity
from omnivl.tasks.captions import write_captions
from omnivl.tasks.needs import Embeddings, Head, Need, Provided, Shown
from omnivl.tasks.routing.task import Routers
from omnivl.tasks.zero_shot import class_cosines, class_embeddings

Query = Tensor | Picture
"""What is searched for: a text (``str``), an embedding ``[P]``, or a picture (no ``str``: a ``Path`` names a file)."""


class Match(NamedTuple):
    """What a search has found.

    Attributes:
        index: Its place among what was searched.
        score: Its cosine with the query, from -1 to 1.
    """

    index: int  # type: ignore[assignment]  # instead of tuple.index, for which a match has no use
    score: float


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        plan: Name of the run's plan.
        stage: Name of the stage.
        weights: The file or folder of its weights.
        step: Optimizer steps that it took; None for weights outside of a run.
    """

    plan: str
    stage: str
    weights: Path
    step: int | None


class Model:
    """A trained stage in evaluation mode. Nothing is drawn and no gradient is kept: equal calls give equal values.

    Pictures are PIL images, uint8 arrays ``[H, W, 3]``, uint8 tensors ``[3, H, W]``, or files by path or content, with
    at least 8 pixels on a side; one, or any iterable of them. They are seen as in evaluation: resized so that the
    shorter side fits, and cut in the middle, or whole where ``sizes`` is not ``fixed`` (but in ``routing``). Clips are
    lists of frames, arrays ``[T, H, W, 3]``, tensors ``[T, 3, H, W]`` or files; evenly spaced frames are taken. Texts
    are cut where the model's positions end.

    ``batch_size`` is the number of pictures or clips of a forward pass. Only where experts choose their tokens, or have
    a capacity, does a value depend on the others of its batch.

    Every method raises a ``UserError`` that says what is wrong with what it was given and what to do about it.

    Attributes:
        origin: Where it comes from.
        encoder: What computes.
        device: Where it computes.
    """

    def __init__(
        self,
        encoder: Encoder,
        origin: Origin,
        stages: Mapping[str, Provided],
        prompts: Mapping[Media, tuple[str, ...]] | None = None,
    ) -> None:
        """Takes a chain that is loaded.

        Args:
            encoder: The chain in evaluation mode, with what its inputs need.
            origin: Where it comes from.
            stages: What each stage of the plan provides, ``origin.stage`` among them.
            prompts: Templates with ``{label}`` of the stage's data of pictures and of clips with labels.
        """
        self.encoder, self.origin, self._stages, self._prompts = encoder, origin, stages, prompts or {}
        self.device = encoder.device

    def encode_image(self, images: Picture | Iterable[Picture], batch_size: int = 32) -> Tensor:
        """Embeds pictures.

        Args:
            images: One picture or several.
            batch_size: Pictures per forward pass.

        Returns:
            fp32 ``[N, P]`` on the CPU, of unit length; ``[N, M, P]`` where the architecture makes several of each.
            Cosines with those of ``encode_text`` say how well texts fit.
        """
        return self._encoded("encode_image", images, "image", batch_size)

    def encode_video(self, clips: Clip | Iterable[Clip], batch_size: int = 32) -> Tensor:
        """Embeds clips; as ``encode_image``, in the same space."""
        return self._encoded("encode_video", clips, "video", batch_size)

    def encode_text(self, texts: str | Iterable[str], batch_size: int = 32) -> Tensor:
        """Embeds texts.

        Args:
            texts: One text or several.
            batch_size: A quarter of the texts per forward pass.

        Returns:
            fp32 ``[N, P]`` on the CPU, of unit length.
        """
        self._require("encode_text", Embeddings())
        return self._texts("texts", texts, batch_size)

    def classify(
        self,
        pictures: Any,
        labels: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        media: Media = "image",
        batch_size: int = 32,
    ) -> list[list[tuple[str, float]]]:
        """Which of some labels fit each picture, without training on them.

        Args:
            pictures: One picture or several, or clips.
            labels: Distinct names of classes.
            prompts: Templates with ``{label}``; their embeddings are averaged, as by the task ``zero_shot``. None takes
                the one in which an objective of the stage has read these labels, else those of its data with labels,
                else the label alone.
            media: ``image``, or ``video`` for clips.
            batch_size: Pictures per forward pass.

        Returns:
            For each picture all labels, the best first, each with its probability: the softmax over the labels of the
            cosine divided by the model's learnt temperature.

        Source: Radford et al., CLIP, arXiv 2103.00020, section 3.1.
        """
        self._require("classify", Embeddings())
        labels = given_texts(labels, "labels")
        prompts = self._trained_prompts(labels, media) if prompts is None else given_texts(prompts, "prompts")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise UserError(f"labels: got {twice[0]!r} more than once; allowed are distinct labels; leave one out")
        for place, prompt in enumerate(prompts):
            if unknown_places(prompt, ["label"]) or "{label}" not in prompt:
                raise UserError(
                    f"prompts[{place}]: got {prompt!r}; allowed are texts with {{label}} and no other braces; write it "
                    "as 'a photo of {label}'"
                )
        encoder = self._encoder(batch_size)
        with torch.no_grad():
            check_words(encoder.tokenizer, "labels", labels)
            classes = class_embeddings(encoder, labels, prompts)
            cosines = [
                class_cosines(encoder.pictures(some), classes)
                for some in self._sets("classify", pictures, media, batch_size)
            ]
            project = self.encoder.chain.get_submodule("contrast")
            assert isinstance(project, Project), "architectures with embeddings have the layer that projects them"
            shares = (torch.cat(cosines) * project.scale().float().cpu()).softmax(dim=1)
        ordered = shares.sort(dim=1, descending=True, stable=True)
        return [
            [(labels[place], share) for place, share in zip(places, values, strict=True)]
            for places, values in zip(ordered.indices.tolist(), ordered.values.tolist(), strict=True)
        ]

    def caption(self, pictures: Any, *, media: Media = "image", num_beams: int = 1, batch_size: int = 32) -> list[str]:
        """A text that the model writes for each picture, as by the task ``caption``.

        Args:
            pictures: One picture or several, or clips.
            media: ``image``, or ``video`` for clips.
            num_beams: 1 decodes greedily; more keep as many texts at each step.
            batch_size: Pictures per forward pass.
        """
        objective = next(iter(self.encoder.writings), "lm")  # which the message names where there is none
        self._require("caption", Head(objective))
        if num_beams < 1:
            raise UserError(f"num_beams: got {num_beams}; allowed is 1 or more; change it")
        encoder = self._encoder(batch_size)
        with torch.no_grad():
            return [
                text
                for some in self._sets("caption", pictures, media, batch_size)
                for text in write_captions(some, encoder, objective, num_beams)
            ]

    def draw(
        self,
        texts: str | Iterable[str],
        *,
        beside: Any = None,
        region: tuple[float, float, float, float] | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """Draws a picture for each text, as the task ``drawing``; equal seeds and places give equal drawings.

        Args:
            texts: One text or several.
            beside: As many pictures, of which a region is drawn anew; None: all is drawn.
            region: With ``beside``, left, top, right and bottom of that region, as shares of width and height of what
                the model sees. Patches of which it covers a part are drawn.
            seed: Of the noise that drawings start from.
            batch_size: Pictures per forward pass.

        Returns:
            uint8 ``[N, 3, H, W]`` on the CPU.
        """
        objective = next((key for key, one in self.encoder.chain.objectives.items() if isinstance(one, Diffusion)), "")
        self._require("draw", Head(objective or "diffusion"))
        told = given_texts(texts, "texts")
        if (beside is None) != (region is None):
            raise UserError("draw: got one of beside and region; allowed are both, or neither; give the other, too")
        encoder = self._encoder(batch_size)
        check_words(encoder.tokenizer, "texts", told)
        with torch.no_grad():
            if beside is None or region is None:
                return encoder.draw(objective, told, seed=seed)
            left, top, right, bottom = region
            if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0):
                raise UserError(
                    f"region: got {region}; allowed are left < right and top < bottom from 0 to 1; change it"
                )
            pictures = next(self._sets("draw", beside, "image", len(told) + 1))
            if len(pictures) != len(told):
                shown = "more" if len(pictures) > len(told) else str(len(pictures))
                raise UserError(
                    f"draw: got {len(told)} texts and {shown} pictures; allowed is one for each; change either"
                )
            kept = kept_outside(region, encoder.model.inputs.grid(False)).expand(len(told), -1)
            return encoder.draw(objective, told, seed=seed, beside=pictures, kept=kept)

    def search(self, query: Query, among: Tensor | Iterable[Any], top: int = 10, batch_size: int = 32) -> list[Match]:
        """What among some pictures, clips or texts is nearest to a query.

        Args:
            query: A text (``str``), a picture (its file as a ``Path``), or an embedding ``[P]`` or ``[1, P]``.
            among: Embeddings ``[N, P]`` of ``encode_image``, ``encode_video`` or ``encode_text``, which are worth
                keeping where one searches often; or texts; or pictures.
            top: Most matches to return.
            batch_size: Pictures per forward pass.

        Returns:
            The nearest first; of equal ones the earlier first.
        """
        self._require("search", Embeddings())
        if top < 1:
            raise UserError(f"top: got {top}; allowed is 1 or more; change it")
        asked = self._embeddings("query", query if is_embedding(query) else [query], batch_size)
        found = self._embeddings("among", among, batch_size)
        if len(asked) != 1 or asked.shape[-1] != found.shape[-1]:
            raise UserError(
                f"query, among: got embeddings {list(asked.shape)} and {list(found.shape)}; allowed are one and "
                "several of the same width; make both with this model"
            )
        scores = similarity(asked, found)[0]
        order = scores.sort(descending=True, stable=True)
        return [
            Match(index, score)
            for index, score in zip(order.indices[:top].tolist(), order.values[:top].tolist(), strict=True)
        ]

    def routing(self, picture: Any = None, text: str | None = None, *, media: Media = "image") -> Routing:
        """Which expert each patch of a picture and each word of a text goes to, in each layer with experts.

        With both, the layers that read the text beside the picture (decoders) are among them.

        Args:
            picture: A picture, or a clip; None for a text alone.
            text: A text; None for a picture alone.
            media: ``image``, or ``video`` for a clip.
        """
        self._require("routing", Routers())
        if picture is None and text is None:
            raise UserError("routing: got neither picture nor text; allowed is one of them, or both; give one")
        said = None if text is None else given_texts([text], "text")[0]
        with torch.no_grad():
            # As the task ``routing`` sees pictures.
            squares = replace(self.encoder.model.inputs, native=False, stretched=False)
            shown = None if picture is None else next(self._sets("routing", [picture], media, 1, squares))
            if said is not None:
                check_words(self.encoder.tokenizer, "text", [said])
            return routing_of(self.encoder, shown, said)

    def __repr__(self) -> str:
        origin = self.origin
        steps = "" if origin.step is None else f", step {origin.step}"
        return (
            f"<Model {origin.plan}, stage {origin.stage}{steps}, {self._size()} on {self.device}: {self._abilities()}>"
        )

    def _repr_html_(self) -> str:
        origin, inputs = self.origin, self.encoder.model.inputs
        rows = {
            "plan": origin.plan,
            "stage": origin.stage if origin.step is None else f"{origin.stage}, step {origin.step}",
            "weights": origin.weights,
            "architecture": f"{self.encoder.model.kind}, {self._size()} on {self.device}",
            "inputs": f"pictures {inputs.side(False)} px, clips {inputs.num_frames} frames of {inputs.side(True)} px, "
            f"texts of {inputs.text_length} tokens",
            "can": self._abilities(),
        }
        cells = "".join(
            f"<tr><th>{Markup.escape(name)}</th><td>{Markup.escape(said)}</td></tr>" for name, said in rows.items()
        )
        return f"<table>{cells}</table>"

    def _size(self) -> str:
        count = sum(parameter.numel() for parameter in self.encoder.chain.parameters())
        return f"{count / 1e6:.1f} M parameters"

    def _abilities(self) -> str:
        """The methods that the stage has what they need for."""
        needs: dict[str, Need] = {"encode, classify, search": Embeddings(), "routing": Routers()}
        own = self._stages[self.origin.stage]
        able = [name for name, need in needs.items() if need.lack(own) is None]
        draws = any(isinstance(one, Diffusion) for one in self.encoder.chain.objectives.values())
        own_heads = [name for name, has in (("caption", self.encoder.writings), ("draw", draws)) if has]
        return ", ".join([*able, *own_heads]) or "none of the methods"

    def _require(self, method: str, need: Need) -> None:
        """Checks that the stage has what a method needs.

        Raises:
            UserError: It lacks it.
        """
        stage = self.origin.stage
        if (lack := need.lack(self._stages[stage])) is None:
            return
        able = [name for name, provided in self._stages.items() if need.lack(provided) is None]
        allowed = f"stages {', '.join(map(repr, able))} of the plan" if able else "no stages of this plan"
        remedy = f"load one: omnivl.load(run, stage={able[-1]!r})" if able else f"train a stage for it ({lack.remedy})"
        raise UserError(f"{method}: got stage {stage!r}, which {lack.what}; allowed are {allowed}; {remedy}")

    def _trained_prompts(self, labels: Sequence[str], media: Media) -> Sequence[str]:
        read = (one.prompt_of(labels) for one in self.encoder.chain.objectives.values())
        known = next((prompt for prompt in read if prompt is not None), None)
        return self._prompts.get(media, ("{label}",)) if known is None else (known,)

    def _encoder(self, batch_size: int) -> Encoder:
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}; allowed is 1 or more; change it")
        return replace(self.encoder, batch_size=batch_size)

    def _encoded(self, method: str, given: Any, media: Media, batch_size: int) -> Tensor:
        self._require(method, Embeddings())
        encoder = self._encoder(batch_size)
        with torch.no_grad():
            return torch.cat([encoder.pictures(some) for some in self._sets(method, given, media, batch_size)])

    def _texts(self, name: str, given: Any, batch_size: int) -> Tensor:
        texts = given_texts(given, name)
        encoder = self._encoder(batch_size)
        check_words(encoder.tokenizer, name, texts)
        with torch.no_grad():
            return encoder.texts(texts)

    def _sets(
        self, method: str, given: Any, media: Media, batch_size: int, sizes: InputSizes | None = None
    ) -> Iterator[PictureSet]:
        """Sets of what a method is given; ``sizes`` are by default those of the model's inputs."""
        if media not in ("image", "video"):
            raise UserError(f"media: got {media!r}; allowed are 'image', 'video'; change it")
        self._require(method, Shown(media))
        return picture_sets(method, given, media, sizes or self.encoder.model.inputs, batch_size)

    def _embeddings(self, name: str, given: Any, batch_size: int) -> Tensor:
        """Embeddings of what a search was given, as they are or made now."""
        if is_embedding(given):
            found: Tensor = given.detach().float().cpu()
            return found[None] if found.dim() == 1 else found
        if isinstance(given, str):
            given = [given]
        things = [*each_picture(given)]
        if things and all(isinstance(one, str) for one in things):
            return self._texts(name, things, batch_size)
        return self._encoded("search", things, "image", batch_size)
