"""Which expert took each patch of a picture and each word of a text.

Shapes: T frames of a clip that have patches of their own (1 for a picture), R rows and C columns of patches, W words,
S side of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnivl.errors import UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.pages import page_template
from omnivl.tasks.routing.maps import NOBODY, expert_colour, expert_grid, painted_picture
from omnivl.tasks.routing.tokens import (
    experts_by_layer,
    joined,
    routed_beside,
    routed_tokens,
    routed_words,
    words_of,
)


@dataclass(frozen=True)
class LayerRouting:
    """The first expert of each patch and word in one layer.

    Attributes:
        layer: Name of the layer, e.g. ``visual_01``.
        num_experts: Its experts, numbered from 0.
        patches: int64 ``[T, R, C]``, -1 where no expert took the patch; None where no picture passes the layer.
        words: The expert of each of ``Routing.words``, -1 where none took it; empty where no text passes the layer.
    """

    layer: str
    num_experts: int
    patches: Tensor | None
    words: tuple[int, ...]


@dataclass(frozen=True)
class Routing:
    """The choices of all routers for one picture and one text. A notebook shows it in colours.

    Attributes:
        layers: The layers with experts, in the order of the forward pass.
        words: The words as the tokenizer cuts them, with its marks of start and end; none where no layer with experts
            has read the text.
        view: The picture or clip as the model saw it, uint8 ``[frames, 3, S, S]``; None for a text alone.
        table: All choices with their weights, a ``pandas.DataFrame``; its columns are described in ``moe.analysis``.
    """

    layers: tuple[LayerRouting, ...]
    words: tuple[str, ...]
    view: Tensor | None = field(repr=False)
    table: Any = field(repr=False, compare=False)

    def __getitem__(self, layer: str) -> LayerRouting:
        """The choices in a layer by its name.

        Raises:
            KeyError: There is no such layer with experts.
        """
        for one in self.layers:
            if one.layer == layer:
                return one
        raise KeyError(f"{layer!r}; layers with experts: {', '.join(one.layer for one in self.layers)}")

    def __repr__(self) -> str:
        patches = next((one.patches.numel() for one in self.layers if one.patches is not None), 0)
        layers = ", ".join(one.layer for one in self.layers)
        return f"<Routing of {patches} patches and {len(self.words)} words in {layers}>"

    def _repr_html_(self) -> str:
        template = page_template(Path(__file__).parent, "routing.html.j2")
        rows = [
            {
                "layer": one.layer,
                "num_experts": one.num_experts,
                "picture": self._painted(one),
                "words": [
                    {"text": word, "expert": expert, "colour": "#{:02x}{:02x}{:02x}".format(*expert_colour(expert))}
                    if expert != NOBODY
                    else {"text": word, "expert": "none", "colour": "#bbbbbb"}
                    for word, expert in zip(self.words, one.words, strict=False)
                ],
                "said": "" if one.patches is None else f"expert of each patch: {one.patches.tolist()}",
            }
            for one in self.layers
        ]
        return template.render(rows=rows)

    def _painted(self, one: LayerRouting) -> str:
        """The picture in the colours of a layer's experts as a data URI; "" where no picture passes it."""
        if self.view is None or one.patches is None:
            return ""
        frames = self.view.permute(0, 2, 3, 1).numpy()
        every = len(frames) // len(one.patches)
        return painted_picture([frames[place * every] for place in range(len(one.patches))], [*one.patches.numpy()])


def routing_of(encoder: Encoder, shown: PictureSet | None, said: str | None) -> Routing:
    """The choices of a stage's routers.

    Args:
        encoder: The trained stage.
        shown: One picture or clip; None for a text alone.
        said: A text; None for a picture alone.

    Raises:
        UserError: There is a text alone, and no layer with experts encodes texts.
    """
    tables: list[Any] = []
    if shown is not None:
        tables.append(routed_tokens(encoder, shown, texts=False))
    pictures = len(tables)
    if said is not None:
        if (heard := routed_words(encoder, [said])) is not None:
            tables.append(heard)
        elif shown is None:
            raise UserError(
                "routing: got a text alone, but this model's text encoder has no layers with experts, so that no "
                "expert takes a word; allowed is a picture or a clip; give one, with the text or without it"
            )
        if shown is not None:
            known = {layer.partition("/")[0] for table in tables for layer in table["layer"].cat.categories}
            beside = routed_beside(encoder, shown, [said], known)
            tables += [] if beside is None else [beside]
    spoken = words_of(encoder, said) if said is not None and len(tables) > pictures else []
    view = None if shown is None else shown.frames([0])[0]
    return _read(encoder, tables[0] if len(tables) == 1 else joined(tables), view, spoken)


def _read(encoder: Encoder, tokens: Any, view: Tensor | None, spoken: Sequence[str]) -> Routing:
    """The choices of a table of routed tokens of one picture and one text.

    Args:
        encoder: The trained stage.
        tokens: From ``routed_tokens`` or ``routed_words``, joined where there are both.
        view: What the picture's tokens are of, uint8 ``[frames, 3, S, S]``; None without one.
        spoken: The words of the text, those that no expert took among them.
    """
    first = tokens[tokens["choice"] == 0]
    layers, model, order = [], encoder.model, [*encoder.chain.named_layers]
    counts = experts_by_layer(model, tokens)
    for layer in sorted(counts, key=lambda name: (order.index(name.partition("/")[0]), name)):
        own = first[first["layer"] == layer]
        patches, words = own[own["row"] >= 0], own[own["word"].notna()]
        grid = None
        if view is not None and (tokens.loc[tokens["layer"] == layer, "row"] >= 0).any():
            times, patch = model.inputs.time_positions(len(view)), model.inputs.patch_size
            every = len(view) // times
            grids = [
                expert_grid(patches[patches["frame"] == time * every], (view.shape[2], view.shape[3]), patch)
                for time in range(times)
            ]
            grid = torch.stack([torch.from_numpy(one) for one in grids])
        takers = dict(zip(words["position"].tolist(), words["expert"].tolist(), strict=True))
        took = tuple(int(takers.get(position, NOBODY)) for position in range(len(spoken))) if len(words) else ()
        layers.append(LayerRouting(layer, counts[layer], grid, took))
    return Routing(tuple(layers), tuple(spoken), view, tokens)
