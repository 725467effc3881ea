"""The chain as a ``PreTrainedModel``.

Shapes: B samples, T frames, H x W pixels, L text positions, S visual positions, D hidden size, P projection size.

Pixels are uint8, as the processor returns them; the first layer of the chain normalises them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from moe.routers.base import Router
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain, text_layout, visual_layout
from omnivl.chain.state import State
from omnivl.errors import ModelError, did_you_mean
from omnivl.hub.configuration import OmniVLConfig
from omnivl.inference.generate import caption_search, generate
from omnivl.inference.predict import predict
from omnivl.objectives import ITM, LM, VLM, VQA, Answer, Objective, SplitLM
from omnivl.parts.block import EmbeddingLayer
from omnivl.parts.project import Project
from omnivl.parts.similarity import similarity


@dataclass
class OmniVLOutput(ModelOutput):
    """What ``OmniVLModel.forward`` returns; all but the last hidden states in fp32.

    Attributes:
        loss: CLIP's contrastive loss of the batch, if requested.
        logits_per_image: ``[B_visual, B_text]``, cosine similarity over temperature, of images or of clips.
        logits_per_text: Its transpose.
        text_embeds: ``[B_text, P]``, L2-normalised.
        image_embeds: ``[B_visual, P]``, L2-normalised, of images or of clips.
        itm_score: ``[B]``, log odds that text i and image or clip i belong together, if requested.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    itm_score: Tensor | None = None


MATCHING: tuple[type[Objective], ...] = (VLM, ITM)
WRITING: tuple[type[Objective], ...] = (LM, SplitLM)
CHOOSING: tuple[type[Objective], ...] = (VQA,)
ANSWERING: tuple[type[Objective], ...] = (Answer, SplitLM)
"""Objectives whose heads match pairs, generate texts, choose answers to questions, and generate answers."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("do_sample", "early_stopping", "return_dict_in_generate", "output_scores"), (False, None)),
    **dict.fromkeys(("num_return_sequences", "num_beam_groups"), (1, None)),
    **dict.fromkeys(("temperature", "top_p"), (1.0, 1, None)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size"), (0, None)),
    **dict.fromkeys(("use_cache",), (True, False, None)),
}
"""Arguments of transformers' ``generate``, with the values that ask for what ``OmniVLModel.generate`` does."""

_RELATIVES = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


class OmniVLModel(PreTrainedModel):
    """Embeds images, clips and texts, compares and matches them, and generates captions if it was trained to.

    Attributes:
        chain: The trained model, without parts that only training needs.
    """

    config_class = OmniVLConfig
    base_model_prefix = "omnivl"
    main_input_name = "pixel_values"
    config: OmniVLConfig

    def __init__(self, config: OmniVLConfig) -> None:
        """Builds the chain of ``config`` with fresh weights.

        Raises:
            ModelError: The configuration does not fit together.
        """
        super().__init__(config)
        self.chain: Chain = build_chain(config.sizes, config.objectives, config.tokens)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a folder that ``omnivl export`` or ``save_pretrained`` wrote; arguments as in ``transformers``.

        Raises:
            ModelError: The folder lacks weights, or some have another shape. Missing weights are never drawn at random.
        """
        tell = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if lacking := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
            raise ModelError(
                f"{args[0] if args else 'folder'}: got weights that do not fill the model of its config.json: "
                f"{', '.join(lacking[:4])} ({len(lacking)} in all); export the model again"
            )
        return (model, info) if tell else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Restores buffers that no file holds; layers have drawn their weights when they were built."""
        if isinstance(module, Router):
            module.restore_allowed()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embeds images.

        Args:
            pixel_values: uint8 ``[B, 3, H, W]``.
            kwargs: Ignored, so that the processor's whole output can be passed.

        Returns:
            ``last_hidden_state [B, S, D]``, and as ``pooler_output`` the L2-normalised embeddings, fp32 ``[B, P]``, or
            ``[B, M, P]`` if each image has several.
        """
        return self._visual(_frames(pixel_values, "pixel_values", 4)[:, None])

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Embeds clips, uint8 ``[B, T, 3, H, W]``; else as ``get_image_features``."""
        return self._visual(_frames(pixel_values_videos, "pixel_values_videos", 5))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embeds texts.

        Args:
            input_ids: int64 ``[B, L]``, L at most the model's ``text_length``.
            attention_mask: ``[B, L]``, 0 where a token is to be ignored; padding is always ignored.
            kwargs: Ignored.

        Returns:
            ``last_hidden_state [B, L, D]``, and as ``pooler_output`` the L2-normalised embeddings, fp32 ``[B, P]``.
        """
        self._require_embeddings()
        token_ids = self._token_ids(input_ids, attention_mask)
        state = self._ready().fold(State({"token_ids": token_ids}, text_layout(len(token_ids))))
        return BaseModelOutputWithPooling(last_hidden_state=state["text"], pooler_output=state["text_embedding"])

    def match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """How well texts fit images or clips, by the matching head.

        Args:
            input_ids: int64 ``[R, L]``.
            attention_mask: As in ``get_text_features``.
            pixel_values: Images, or
            pixel_values_videos: clips: one of the two.
            rows: int64 ``[R]``, the image or clip that goes with each text; None: text i goes with image i.

        Returns:
            fp32 ``[R]``: log odds that the two belong together.

        Raises:
            ModelError: The model was not trained to match.
        """
        head = self._required(MATCHING, "match")
        frames = _one_of(pixel_values, pixel_values_videos)
        return predict(self._ready(), head, frames, self._token_ids(input_ids, attention_mask), rows)

    def answer_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
    ) -> Tensor:
        """How well each answer of the list in ``config.heads`` answers a question about an image or clip.

        Arguments as in ``match``; the texts are the questions.

        Returns:
            fp32 ``[R, answers]``.

        Raises:
            ModelError: The model was not trained to choose answers.
        """
        head = self._required(CHOOSING, "choose answers")
        frames = _one_of(pixel_values, pixel_values_videos)
        return predict(self._ready(), head, frames, self._token_ids(input_ids, attention_mask))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        use_itm_head: bool = False,
        return_loss: bool = False,
        **kwargs: Any,
    ) -> OmniVLOutput:
        """Compares every image or clip with every text; with one of the two alone, embeds it.

        Args:
            input_ids: int64 ``[B_text, L]``.
            attention_mask: As in ``get_text_features``.
            pixel_values: Images uint8 ``[B_visual, 3, H, W]``, or
            pixel_values_videos: clips uint8 ``[B_visual, T, 3, H, W]``.
            use_itm_head: Whether to match text i with image or clip i as well.
            return_loss: Whether to return CLIP's loss, for which text i and image or clip i are the only pair.
            kwargs: Ignored.

        Raises:
            ModelError: There is neither text nor pixels, or both images and clips, or no matching head though
                requested.
        """
        out = OmniVLOutput()
        if input_ids is not None:
            out.text_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        if input_ids is None or pixel_values is not None or pixel_values_videos is not None:
            out.image_embeds = self._visual(_one_of(pixel_values, pixel_values_videos)).pooler_output
        if input_ids is not None and out.text_embeds is not None and out.image_embeds is not None:
            project = self.chain.get_submodule("contrast")
            assert isinstance(project, Project)
            out.logits_per_text = project.scale().float() * similarity(out.text_embeds, out.image_embeds)
            out.logits_per_image = out.logits_per_text.t()
            if return_loss:
                own = torch.arange(len(out.text_embeds), device=self.device)
                directions = (out.logits_per_text, out.logits_per_image)
                out.loss = torch.stack([F.cross_entropy(logits, own) for logits in directions]).mean()
            if use_itm_head:
                out.itm_score = self.match(input_ids, attention_mask, pixel_values, pixel_values_videos)
        return out

    def generate(
        self,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """Generates a caption for each image or clip, or the answer to a question about it, by greedy or beam search.

        The search is that of transformers, but for the default of ``length_penalty``.

        Args:
            pixel_values: Images, or
            pixel_values_videos: clips: one of the two.
            input_ids: Questions int64 ``[B, L]``, for models that were trained to answer them, or beginnings of the
                captions, for models that were trained to go on with them; other models ignore it.
            attention_mask: As in ``get_text_features``.
            max_new_tokens: Largest number of tokens, end token included; None: the model's number of positions.
            num_beams: Number of texts kept at each step.
            min_new_tokens: Smallest number of tokens before the end token.
            length_penalty: The best one maximises log probability / length ** length_penalty.
            repetition_penalty: Above 1, tokens that the text has already are less likely.
            kwargs: Further arguments of transformers, at the values with which they change nothing here (``NEUTRAL``).

        Returns:
            int64 ``[B, max_new_tokens]``: up to and including the end token, padded; for ``processor.batch_decode``.

        Raises:
            ModelError: The model was not trained to generate, or has too few positions, or an argument is unknown.
        """
        _refuse_unknown(kwargs)
        head = None if input_ids is None else self.head(ANSWERING)
        asked = None if head is None or input_ids is None else self._token_ids(input_ids, attention_mask)
        head = head or self._required(WRITING, "write captions")
        if prompt := getattr(self.chain.objectives[head], "prompt", ""):
            told = f"generate: captions stand behind the prompt {prompt!r}, whose tokens are not known here"
            raise ModelError(f"{told}; use omnivl.load(...).caption")
        tokens, most = self.config.tokens, self.config.sizes.inputs.text_length - 1
        length = most if max_new_tokens is None else max_new_tokens
        if not 1 <= length <= most:
            raise ModelError(f"max_new_tokens: got {length}; allowed 1 to {most}, the model's positions; change it")
        options = caption_search(
            tokens,
            length,
            num_beams,
            length_penalty=length_penalty,
            min_length=min_new_tokens,
            repetition_penalty=repetition_penalty,
        )
        frames = _one_of(pixel_values, pixel_values_videos)
        if asked is None and isinstance(self.chain.objectives[head], SplitLM):  # an empty beginning
            asked = torch.tensor([[tokens.cls, tokens.sep]], device=frames.device).repeat(len(frames), 1)
        return generate(self._ready(), head, frames, options, token_ids=asked).token_ids

    def _visual(self, frames: Tensor) -> BaseModelOutputWithPooling:
        """Features of ``[B, T, 3, H, W]``."""
        self._require_embeddings()
        state = self._ready().fold(State({"frames": frames}, visual_layout(frames)))
        return BaseModelOutputWithPooling(last_hidden_state=state["visual"], pooler_output=state["visual_embedding"])

    def _ready(self) -> Chain:
        """The chain, set to compute in the current dtype of its weights."""
        first = self.chain.program[0]
        assert isinstance(first, EmbeddingLayer)
        first.dtype = self.dtype
        return self.chain

    def _token_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Ids with padding where the mask hides a token: the chain masks padding."""
        return input_ids if attention_mask is None else input_ids.where(attention_mask.bool(), self.config.tokens.pad)

    def head(self, kinds: tuple[type[Objective], ...]) -> str | None:
        """Key of the first objective of ``kinds``, such as ``MATCHING``, whose head the model has."""
        objectives = self.chain.objectives.values()
        return next((objective.key for objective in objectives if isinstance(objective, kinds)), None)

    def _required(self, kinds: tuple[type[Objective], ...], what: str) -> str:
        """``head``, if it has to exist.

        Raises:
            ModelError: There is none.
        """
        found = self.head(kinds)
        if found is None:
            known = ", ".join(self.chain.objectives) or "none"
            wanted = " or ".join(kind.kind for kind in kinds)  # type: ignore[attr-defined]  # every member declares it
            raise ModelError(
                f"{what}: got a model without the head of {wanted} (it has {known}); allowed are models that were "
                f"trained with the objective {wanted}; export a stage that has it"
            )
        return found

    def _require_embeddings(self) -> None:
        """Refuses models without embeddings.

        Raises:
            ModelError: It has no embeddings.
        """
        sizes = self.config.sizes
        if "embedding" not in sizes.streams:
            raise ModelError(
                f"embeddings: got architecture {sizes.kind!r}, which has {', '.join(sizes.streams)}; allowed are "
                "architectures with the stream 'embedding'; ask match() for each pair"
            )


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of ``generate`` that would be without effect.

    Raises:
        ModelError: One is unknown, or has a value that asks for another search.
    """
    known = [*inspect.signature(OmniVLModel.generate).parameters][1:-1]
    for name, value in arguments.items():
        if name not in NEUTRAL:
            change = f"give {_RELATIVES[name]}" if name in _RELATIVES else did_you_mean(name, known, "leave it out")
            raise ModelError(f"generate: got an argument {name!r}; allowed are {', '.join(known)}; {change}")
        if not any(value is one or (type(value) is type(one) and value == one) for one in NEUTRAL[name]):
            allowed = " or ".join(map(repr, NEUTRAL[name]))
            raise ModelError(
                f"generate: {name}: got {value!r}; allowed {allowed}, by greedy or beam search; leave it out"
            )


def _frames(pixels: Tensor, name: str, dimensions: int) -> Tensor:
    """Checks pixels.

    Raises:
        ModelError: They are not uint8, or have another number of dimensions.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != dimensions:
        shape = "[B, 3, H, W]" if dimensions == 4 else "[B, T, 3, H, W]"
        raise ModelError(
            f"{name}: got {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}; allowed uint8 {shape}, "
            "which the model normalises itself; take them from the model's own processor"
        )
    return pixels


def _one_of(images: Tensor | None, clips: Tensor | None) -> Tensor:
    """Frames ``[B, T, 3, H, W]`` of the one that is given.

    Raises:
        ModelError: Neither is given, or both.
    """
    if images is not None and clips is None:
        return _frames(images, "pixel_values", 4)[:, None]
    if clips is not None and images is None:
        return _frames(clips, "pixel_values_videos", 5)
    raise ModelError(
        f"pixel_values, pixel_values_videos: got {'neither' if images is None else 'both'}; allowed is one of the two; "
        "call the model once for images and once for clips"
    )
