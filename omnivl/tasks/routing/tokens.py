"""Which expert took which patch and which word, as a table (its rows are described in ``moe.analysis``).

Shapes: B samples, S visual positions (class token first, then frame by frame, row by row), L text positions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from moe.routers.base import Router
from moe.routers.recorder import Heard, listening
from omnivl.architectures import Architecture
from omnivl.architectures.clip import up_to_end
from omnivl.chain.chain import visual_layout
from omnivl.chain.demands import CLEAN, Join
from omnivl.chain.names import stack_of
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import Tokenizer
from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import ChainDecoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.predict import predict
from omnivl.parts.block import BlockLayer
from omnivl.parts.padding import Padding

CLASS_TOKEN = -1
_SAMPLES, _POSITIONS = 2**22, 2**16
_CATEGORIES = ("layer", "modality", "label", "word")


@dataclass(frozen=True)
class Places:
    """Properties of the tokens that a router saw, one element per token.

    Attributes:
        token: Number of the token, the same in every layer and model.
        columns: Further columns of the table, by name.
        kept: Mask of the tokens that are kept; None for all.
    """

    token: np.ndarray
    columns: Mapping[str, np.ndarray]
    kept: np.ndarray | None = None


def routed_tokens(encoder: Encoder, pictures: PictureSet, texts: bool = True) -> Any:
    """Encodes pictures or clips and their first captions, and records the experts of each token.

    With expert choice they depend on the token's batch.

    Args:
        encoder: A chain with routers, on one process.
        pictures: The pictures or clips.
        texts: Whether captions are encoded as well, of the samples that have one.

    Returns:
        A ``pandas.DataFrame`` of routed tokens: columns of ``moe.analysis``, and ``modality``, ``sample``, ``label``,
        ``position``; for patches ``frame``, ``row``, ``column`` (-1 for the class token), for words ``word``.

    Raises:
        UserError: The model has no router.
    """
    parts: list[Any] = []
    for first in range(0, len(pictures), encoder.batch_size):
        indices = range(first, min(len(pictures), first + encoder.batch_size))
        parts += _of_patches(encoder, pictures, indices)
        if texts and (told := [index for index in indices if pictures.samples[index].captions]):
            spoken = [pictures.samples[index].captions[0] for index in told]
            parts += _of_words(encoder, spoken, told, [pictures.samples[index].label for index in told])
    return _table(encoder, parts)


def routed_words(encoder: Encoder, texts: Sequence[str]) -> Any:
    """The same table of texts alone; ``sample`` is the place of a text.

    Returns:
        The table; None where no layer with a router encodes texts, as in a bag of words (``text_layers: 0``).
    """
    parts: list[Any] = []
    for first in range(0, len(texts), encoder.batch_size):
        told = range(first, min(len(texts), first + encoder.batch_size))
        parts += _of_words(encoder, [texts[index] for index in told], told, [None] * len(told))
    return _table(encoder, parts) if parts else None


def routed_beside(encoder: Encoder, pictures: PictureSet, texts: Sequence[str], known: Collection[str]) -> Any:
    """The same table of the words of texts in layers that read them beside the pictures: those of the decoders.

    Each objective of the stage that predicts from a picture and a text reads the texts as it does in training. Layers
    whose tokens are more than the words, as where patches and words are one sequence, are left out.

    Args:
        encoder: A chain with routers, on one process.
        pictures: N pictures or clips.
        texts: N texts.
        known: Layers to leave out, those of the encoders.

    Returns:
        The table; None where no such layer has a router.
    """
    blocks = {name: block for name, block in _modules(encoder).items() if name not in known}
    modules = {name: block for name, block in blocks.items() if any(isinstance(one, Router) for one in block.modules())}
    if not modules:
        return None
    indices = range(len(pictures))
    frames, token_ids = pictures.frames(indices).to(encoder.device), encoder.token_ids(texts)
    mask = _said(token_ids.cpu(), encoder.tokenizer.special)
    sizes = (token_ids.numel(), len(Padding(mask).index))
    parts: list[Any] = []
    for objective in encoder.chain.objectives:
        with listening(modules) as heard:
            read_beside(encoder, objective, frames, token_ids)
        own = [one for one in heard if len(one.expert_TK) in sizes]
        for one in own:
            parts += _rows([one], _words(encoder, indices, [None] * len(texts), token_ids, one))
        modules = {name: block for name, block in modules.items() if name not in {one.layer for one in own}}
    return _table(encoder, parts) if parts else None


def read_beside(encoder: Encoder, objective: str, frames: Tensor, token_ids: Tensor) -> None:
    """Calls the layers that an objective predicts with from pictures with a text of each; none if it reads more."""
    chain, special = encoder.chain, encoder.tokenizer.special
    asks = chain.objectives[objective].asks(visual_layout(frames).kind, len(frames))
    joins = [] if asks is None else [*asks.joins.values()]
    if joins == [Join()]:
        predict(chain, objective, frames, token_ids)
        return
    writing = encoder.writings.get(objective)
    if writing is not None and writing.tokenizer is encoder.tokenizer and [one.sees for one in joins] == [CLEAN]:
        begun = torch.where(token_ids == special.cls, special.decode, token_ids)
        ChainDecoder(chain, objective, chain.features(frames), num_beams=1, cached=False)(begun, None)


def _of_patches(encoder: Encoder, pictures: PictureSet, indices: range) -> list[Any]:
    frames = pictures.frames(indices).to(encoder.device)
    with listening(_modules(encoder)) as heard:
        encoder.chain.encode_visual(frames)
    return _rows(heard, _patches(encoder, pictures, indices, frames))


def _of_words(encoder: Encoder, texts: Sequence[str], told: Sequence[int], labels: Sequence[str | None]) -> list[Any]:
    """Of texts, the samples that they belong to, and the labels of these."""
    token_ids = encoder.token_ids(texts)
    with listening(_modules(encoder)) as heard:
        encoder.chain.encode_text(token_ids)
    return [row for one in heard for row in _rows([one], _words(encoder, told, labels, token_ids, one))]


def _table(encoder: Encoder, parts: Sequence[Any]) -> Any:
    if not parts:
        raise UserError(
            f"model: got {encoder.model.kinds_of_filling} layers, which choose no experts by the token; allowed "
            "are 'limoe' and 'mome_limoe'; name a run that was trained with one of them"
        )
    return _with_categories(pd.concat(parts, ignore_index=True))


def joined(tables: Sequence[Any]) -> Any:
    """One table of routed tokens of several sets, as of pictures and of clips, whose captions are other tokens then."""
    parts = []
    for number, table in enumerate(tables):
        shift = np.where(table["modality"] == "text", number * _SAMPLES * _POSITIONS, 0)
        parts.append(table.assign(token=table["token"] + shift).astype(dict.fromkeys(_CATEGORIES, object)))
    return _with_categories(pd.concat(parts, ignore_index=True))


def _with_categories(table: Any) -> Any:
    for name in _CATEGORIES:
        table[name] = table[name].astype("category")
    return table


def experts_by_layer(model: Architecture, tokens: Any) -> dict[str, int]:
    """Number of experts of each layer in a table of routed tokens."""
    layers: Sequence[str] = tokens["layer"].cat.categories
    return {layer: model.sparse[stack_of(layer.partition("/")[0])].num_experts for layer in layers}


def _modules(encoder: Encoder) -> dict[str, nn.Module]:
    """The blocks of the chain, by the names of their layers."""
    blocks = {name: layer.block for name, layer in encoder.chain.named_children() if isinstance(layer, BlockLayer)}
    return {name: block for name, block in blocks.items() if isinstance(block, nn.Module)}


def _rows(heard: Sequence[Heard], places: Places) -> list[Any]:
    """A frame for each call of a router and each choice."""
    found = []
    for one in heard:
        assert len(one.expert_TK) == len(places.token), f"{one.layer}: {len(one.expert_TK)} tokens were heard"
        for choice in range(one.expert_TK.shape[1]):
            frame = pd.DataFrame(
                {
                    "layer": one.layer,
                    "token": places.token,
                    "choice": choice,
                    "expert": one.expert_TK[:, choice].numpy().astype(np.int32),
                    "gate": one.gate_TK[:, choice].numpy(),
                    "served": one.served_TK[:, choice].numpy(),
                    "entropy": one.entropy_T.numpy(),
                    **places.columns,
                }
            )
            kept = frame["expert"] >= 0  # below 0: no expert, or no further expert, took the token
            found.append(frame[kept if places.kept is None else kept & places.kept])
    return found


def _patches(encoder: Encoder, pictures: PictureSet, indices: range, frames: Tensor) -> Places:
    patch = encoder.model.inputs.patch_size
    rows, columns = frames.shape[-2] // patch, frames.shape[-1] // patch
    times = encoder.model.inputs.time_positions(frames.shape[1])
    position = np.arange(1 + times * rows * columns)
    place, within = np.divmod(position - 1, rows * columns)
    spots = {
        "position": position,
        "frame": np.where(position == 0, CLASS_TOKEN, place * (frames.shape[1] // times)),
        "row": np.where(position == 0, CLASS_TOKEN, within // columns),
        "column": np.where(position == 0, CLASS_TOKEN, within % columns),
    }
    sample = np.repeat(np.array(indices), len(position))
    tiled = {name: np.tile(values, len(indices)) for name, values in spots.items()}
    words = np.full(len(sample), None, dtype=object)
    modality = 0 if pictures.media == "image" else 1
    known = _known(np.array([one.label for one in pictures.samples], dtype=object)[sample], sample, pictures.media)
    return Places(_number(modality, sample, tiled["position"]), {**known, **tiled, "word": words})


def _words(
    encoder: Encoder, told: Sequence[int], labels: Sequence[str | None], token_ids: Tensor, heard: Heard
) -> Places:
    """Words, whether the block left padding out (towers on a CPU) or not."""
    ids, special = token_ids.cpu(), encoder.tokenizer.special
    mask = _said(ids, special)
    flat, kept = np.arange(ids.numel()), mask.flatten().numpy()
    if len(heard.expert_TK) != ids.numel():
        padding = Padding(mask)
        flat, kept = padding.index.numpy(), padding.valid.numpy()
    length = ids.shape[1]
    sample, position = np.array(told)[flat // length], flat % length
    words = _named(encoder.tokenizer, ids.flatten()[flat])
    nowhere = np.full(len(flat), CLASS_TOKEN)
    spots = {"position": position, "frame": nowhere, "row": nowhere, "column": nowhere}
    known = _known(np.array(labels, dtype=object)[flat // length], sample, "text")
    return Places(_number(2, sample, position), {**known, **spots, "word": np.array(words, dtype=object)}, kept)


def words_of(encoder: Encoder, text: str) -> list[str]:
    """A text as its tokenizer cuts it, with the marks of start and end: the words by their ``position``."""
    ids = encoder.token_ids([text]).cpu()
    return _named(encoder.tokenizer, ids[_said(ids, encoder.tokenizer.special)])


def _said(ids: Tensor, special: SpecialTokens) -> Tensor:
    """Which positions are not padding, bool as ``ids``."""
    return up_to_end(ids, special) if special.pad == special.sep else ids != special.pad


def _named(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    special = tokenizer.special
    names = {special.pad: "[PAD]", special.cls: "[CLS]", special.sep: "[SEP]"}
    return [names.get(number) or tokenizer.decode([number]) for number in ids.tolist()]


def _known(label: np.ndarray, sample: np.ndarray, modality: str) -> dict[str, np.ndarray]:
    return {"modality": np.full(len(sample), modality, dtype=object), "sample": sample, "label": label}


def _number(modality: int, sample: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One integer for each token of a set."""
    number: np.ndarray = (modality * _SAMPLES + sample.astype(np.int64)) * _POSITIONS + position
    return number
