"""Drawing pictures from captions: does the model find the caption again in what it has drawn?

Shapes: N captions, M pictures, P projection size, H x W pixels, G x G patches of a picture.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from moe.ranges import Range
from omnivl.inference.draw import kept_outside
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet, as_png
from omnivl.objectives.diffusion import Diffusion
from omnivl.parts.similarity import similarity
from omnivl.tasks.needs import Chooses, Embeddings, Need
from omnivl.tasks.pixel_baseline import BaselineReference
from omnivl.tasks.results import Gallery, GalleryRow, Score, TaskResult, evenly, mean_score
from omnivl.tasks.task import Samples, Task

_LOWER_HALF = (0.0, 0.5, 1.0, 1.0)


@dataclass(frozen=True)
class DrawingTask(Task):
    """Draws a picture for each caption, and looks for the caption in it.

    R-precision: the share of drawings whose nearest caption, by the stage's own embeddings, is the one that they were
    drawn from. The judge was trained on what the drawer was trained on: compare with the same figure of the samples'
    own pictures, and of the pictures of the training data that are nearest to the captions, which need no drawing.

    Attributes:
        objective: Key of an objective of kind ``diffusion``.
        training: The training pictures; null: nothing is compared with them.
        seed: Of the noise that drawings start from.
        gallery: Number of captions to show in the report, evenly spread, with the drawing, the own picture, the nearest
            training picture, and the own picture whose lower half was drawn anew; 0 for none.

    Source: Xu et al., AttnGAN, arXiv 1711.10485, section 4 (R-precision, R = 1).
    Differs: among all captions of the samples, not 100; equal captions count as one.
    """

    kind: Literal["drawing"] = "drawing"
    objective: str = "diffusion"
    max_samples: Annotated[int, Range(1)] = 512
    training: BaselineReference | None = None
    seed: int = 0
    gallery: Annotated[int, Range(0)] = 12

    @property
    def needs(self) -> tuple[Need, ...]:
        """The head that draws, and embeddings that judge."""
        return (Chooses(self.objective, (Diffusion,)), Embeddings())

    @property
    def figures(self) -> tuple[str, ...]:
        """See ``Task``."""
        nearest = ("R-precision, nearest training pictures", "cosine to the nearest training picture")
        return ("R-precision", "R-precision, own pictures", *(nearest if self.training is not None else ()))

    @property
    def samples(self) -> tuple[Samples, ...]:
        """See ``Task``."""
        if self.training is None:
            return super().samples
        known = self.training
        own = Samples(("training", "source"), known.source, known.media, known.where, self.reads, known.max_samples)
        return (*super().samples, own)

    def run(self, encoder: Encoder) -> TaskResult:
        """See ``Task``.

        Raises:
            UserError: The stage has no such objective.
        """
        pictures = self.picture_set(encoder)
        captions = pictures.captions
        names = sorted(set(captions))
        own = torch.tensor([names.index(caption) for caption in captions])
        texts = encoder.texts(names)
        drawn = encoder.draw(self.objective, captions, seed=self.seed)
        embedded, real = encoder.squares_embedded(drawn), encoder.pictures(pictures)
        found = {"drawing": _nearest(embedded, texts), "own": _nearest(real, texts)}
        right = {name: one == own for name, one in found.items()}
        chance = 1 / len(names)
        scores = [
            mean_score(self.name, "R-precision", right["drawing"].numpy(), chance=chance),
            mean_score(self.name, "R-precision, own pictures", right["own"].numpy(), chance=chance),
        ]
        known, nearest = None, torch.zeros(0, dtype=torch.int64)
        if self.training is not None:
            known = self.training.picture_set(encoder, self.reads)
            trained = encoder.pictures(known)
            nearest = _nearest(texts, trained)[own]
            right["nearest"] = _nearest(trained, texts)[nearest] == own
            scores += [
                mean_score(
                    self.name, "R-precision, nearest training pictures", right["nearest"].numpy(), chance=chance
                ),
                _copies(self.name, embedded, real, trained),
            ]
        return TaskResult(tuple(scores), self._shown(encoder, pictures, captions, drawn, right, known, nearest))

    def _shown(
        self,
        encoder: Encoder,
        pictures: PictureSet,
        captions: list[str],
        drawn: Tensor,
        right: dict[str, Tensor],
        known: PictureSet | None,
        nearest: Tensor,
    ) -> tuple[Gallery, ...]:
        """Some captions, each with its drawing and what that is compared with."""
        places = evenly(len(captions), self.gallery)
        if not places:
            return ()
        chosen = pictures.chosen(places)
        upper = kept_outside(_LOWER_HALF, encoder.model.inputs.grid(False)).expand(len(places), -1)
        told = [captions[place] for place in places]
        edited = encoder.draw(self.objective, told, seed=self.seed, beside=chosen, kept=upper)
        shown_rows = []
        for number, place in enumerate(places):
            shown = [
                ("drawn", as_png(drawn[place]), bool(right["drawing"][place])),
                ("its own picture", pictures.thumbnail(place), bool(right["own"][place])),
                ("its own, the lower half drawn anew", as_png(edited[number]), False),
            ]
            if known is not None:
                picture = known.thumbnail(int(nearest[place]))
                shown.append(("nearest training picture", picture, bool(right["nearest"][place])))
            titles, images, hits = zip(*shown, strict=True)
            shown_rows.append(GalleryRow(captions[place], "", titles, images, hits))
        note = f"{len(shown_rows)} of {len(captions):,} captions, evenly spread in the order of the samples."
        return (Gallery(f"{self.name}: drawn from captions", tuple(shown_rows), notes=(note,)),)


def _nearest(queries: Tensor, among: Tensor) -> Tensor:
    """The row of ``among`` with the largest cosine with each query, int64 ``[queries]``."""
    return similarity(queries, among).argmax(dim=1)


def _copies(task: str, drawn: Tensor, real: Tensor, trained: Tensor) -> Score:
    """How near drawings are to training pictures; as the baseline, how near the samples' own pictures are."""
    near, usual = (similarity(one, trained).amax(dim=1) for one in (drawn, real))
    metric = "cosine to the nearest training picture"
    return mean_score(task, metric, near.numpy(), baseline=float(usual.mean()), graded=False)
