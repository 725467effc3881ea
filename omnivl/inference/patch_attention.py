"""How much a text attends to each patch of its picture, where an objective's head, or decoder, reads it.

Plain weights of attention, without gradients: what the model read, not why it said what it said.

Shapes: N pictures, R rows, L text positions, S visual positions, T frames or pictures of a set as the model sees them,
P patches of a frame in ``grid`` rows and columns.

Source: maps of the cross-attention of a multimodal encoder as in Li et al., ALBEF, arXiv 2107.07651, section 6.4.
Differs: its maps are gradients times weights (Grad-CAM) of the third of six layers; these are weights of the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnivl.chain.chain import Chain
from omnivl.chain.demands import CLEAN
from omnivl.chain.pictures import Pictures
from omnivl.data.batch import num_places
from omnivl.inference.encoder import Encoder
from omnivl.inference.generate import ChainDecoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.predict import predict
from omnivl.inference.written import looked_at
from omnivl.parts.attended import Attended, attending, attends
from omnivl.parts.block import StackBlock

Reader = Literal["the text's first position, which the head reads", "the text's words", "the written words"]
"""The positions of the text whose weights are taken, a mean over them where they are several."""


@dataclass(frozen=True)
class PatchAttention:
    """The attention of N texts to the patches of their pictures.

    Attributes:
        pictures: The N pictures.
        layer: Name of the layer, the last one of its stack.
        num_heads: Of the layer; weights are a mean over them.
        reader: Whose attention it is.
        grids: Of each picture ``[T, rows, columns]``, adding up to 1 over all patches.
        shares: Of each, the share of its attention that all patches together have; the rest is on class tokens, and on
            words where they are in the same rows.
    """

    pictures: PictureSet
    layer: str
    num_heads: int
    reader: Reader
    grids: tuple[NDArray[np.float32], ...]
    shares: tuple[float, ...]


def patch_attention(
    encoder: Encoder, objective: str, pictures: PictureSet, texts: Sequence[str]
) -> PatchAttention | None:
    """The attention of texts to the patches of their pictures, as an objective reads or writes them.

    Every replica computes all of it, in the same batches: layers of a sharded model must be called in step.

    Args:
        encoder: A stage with the objective, in evaluation mode and without gradients.
        objective: Its key.
        pictures: N pictures, clips or sets.
        texts: N texts: those that the objective is asked about, or those that it wrote.

    Returns:
        None where no layer joins the objective's texts with patches.
    """
    blocks, grids = _last_blocks(encoder.chain), list[NDArray[np.float32]]()
    last: tuple[Attended, Reader] | None = None
    size = max(1, encoder.batch_size // 4)
    for first in range(0, len(pictures) if blocks else 0, size):
        share = list(range(first, min(first + size, len(pictures))))
        frames = Pictures.of(encoder.shown(pictures, share))
        with attending(blocks) as heard:
            read = _read(encoder, objective, frames, [texts[i] for i in share])
        if read is None or not heard:
            return None
        last, kept = (heard[-1], read[0]), read[1][..., None].float()
        mean = (last[0].weights * kept).sum(dim=1) / kept.sum(dim=1)
        grids += _patches(mean, frames, encoder.model.inputs.patch_size)
    if last is None:
        return None
    shares = tuple(float(grid.sum()) for grid in grids)
    whole = tuple(grid / share if share > 0 else grid for grid, share in zip(grids, shares, strict=True))
    return PatchAttention(pictures, last[0].layer, last[0].num_heads, last[1], whole, shares)


def _last_blocks(chain: Chain) -> Mapping[str, nn.Module]:
    """The last block that joins texts with patches in each stack, by its layer's name."""
    last: dict[str, tuple[str, nn.Module]] = {}
    for name, layer in chain.named_layers.items():
        if isinstance(layer, StackBlock) and attends(layer.block):
            last[layer.stack] = (name, layer.block)
    return dict(last.values())


def _read(encoder: Encoder, objective: str, pictures: Pictures, texts: Sequence[str]) -> tuple[Reader, Tensor] | None:
    """Has the model read texts beside pictures as an objective does, or writes them.

    Returns:
        Whose attention counts, and those positions, bool ``[R, L]``; None where the objective joins no text.
    """
    chain, special = encoder.chain, encoder.tokenizer.special
    asks = chain.objectives[objective].asks(pictures.kind, len(pictures))
    joins = {} if asks is None else asks.joins
    written = [join for join in joins.values() if join.mask == "causal"]
    if asks is not None and len(joins) > len(written):  # some text is read
        token_ids = encoder.token_ids(texts)
        if written:
            looked_at(chain, objective, pictures, token_ids)
        else:
            predict(chain, objective, pictures, token_ids)
        said = (token_ids != special.pad).cpu()
        if "pooled" not in asks.reads:
            return "the text's words", said
        first = torch.zeros_like(said)
        first[:, 0] = True
        return "the text's first position, which the head reads", first
    writing = encoder.writings.get(objective)
    if writing is None or writing.tokenizer is not encoder.tokenizer or [join.sees for join in written] != [CLEAN]:
        return None
    words = [encoder.reader.words(text) for text in texts]
    rows = [[*writing.given, *own][: encoder.reader.length] for own in words]
    token_ids = torch.full((len(rows), max(map(len, rows))), special.pad)
    predicting = torch.zeros_like(token_ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        token_ids[place, : len(row)] = torch.tensor(row)
        predicting[place, len(writing.given) - 1 : max(len(row) - 1, len(writing.given))] = True
    memory, mask = looked_at(chain, objective, pictures)
    decoder = ChainDecoder(chain, objective, memory, num_beams=1, cached=False, memory_mask=mask)
    decoder(token_ids.to(encoder.device), None)
    return "the written words", predicting


def _patches(weights: Tensor, pictures: Pictures, patch: int) -> list[NDArray[np.float32]]:
    """The part of weights ``[R, S]`` that patches have, of each row ``[T, rows, columns]``.

    A row has one class token before all patches, or one before those of each frame.
    """
    frames, count = pictures.frames, weights.shape[1]
    if pictures.grids is None:
        rows, columns = frames.shape[-2] // patch, frames.shape[-1] // patch
        grids, places = [(rows, columns)] * len(frames), rows * columns
    else:
        grids, places = [(int(down), int(across)) for down, across in pictures.grids.tolist()], num_places(frames)
    times = frames.shape[1]
    if (count - 1) % places == 0 and (count - 1) // places <= times:
        by_frame = weights[:, 1:].reshape(len(weights), -1, places)
    else:
        by_frame = weights.reshape(len(weights), times, 1 + places)[:, :, 1:]
    return [
        row[:, : down * across].reshape(-1, down, across).numpy()
        for row, (down, across) in zip(by_frame, grids, strict=True)
    ]
