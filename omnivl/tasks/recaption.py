"""Captions of a data set by a trained model: written for each picture, and kept where they match it.

Source: Li et al., BLIP, arXiv 2201.12086, section 3.3 (CapFilt): a captioner writes a caption of each picture of the
    web, a filter takes out the texts, found and written, that its matching head calls unmatched.
Differs: captions are written greedily or by beams; BLIP samples them (nucleus, p = 0.9), which its table 2 has as
    better for training. BLIP fine-tunes captioner and filter on COCO first: give stages that were.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from omnivl.data.convert.entry import Entry
from omnivl.data.sources.base import BadSampleError, Rejection, Sample, Source
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet
from omnivl.tasks.captions import write_captions
from omnivl.tasks.pairs import predict_pairs

_CHUNK = 1024
"""Samples in memory at a time."""


@dataclass(frozen=True)
class Captioner:
    """Who writes captions.

    Attributes:
        encoder: A stage with the objective's head.
        objective: Key of an objective that writes.
        num_beams: 1 decodes greedily.
    """

    encoder: Encoder
    objective: str = "lm"
    num_beams: int = 3


@dataclass(frozen=True)
class Filter:
    """Who judges captions.

    Attributes:
        encoder: A stage with the objective's head.
        objective: Key of an objective that matches pictures and texts.
        least: Captions whose log odds of a match are below this are taken out.
    """

    encoder: Encoder
    objective: str = "vlm"
    least: float = 0.0


@dataclass(frozen=True)
class Recaptioned:
    """The samples of a source with captions written and filtered, for ``omnivl.data.convert.run.convert``.

    The caption that was written stands behind those that were found, in the sample's field ``written`` as well if it
    was kept. A sample without a caption left is rejected as ``missing_caption``.

    Attributes:
        source: Where samples come from, with encoded pictures or clips.
        media: ``image`` or ``video``.
        captioner: Who writes; None: nobody.
        judge: Who filters; None: nobody.
        inputs: Files that are read, which the output must not contain.
    """

    source: Source
    media: Media
    captioner: Captioner | None = None
    judge: Filter | None = None
    inputs: tuple[Path, ...] = ()

    @property
    def form(self) -> str:
        """Name of the form."""
        return "captions"

    def count(self) -> int:
        """Samples of the source."""
        return len(self.source)

    def entries(self) -> Iterator[Entry | Rejection]:
        """Each sample with the captions that are kept."""
        yield from self.source.rejections
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(self.source), _CHUNK):
                samples: list[Sample] = []
                for index in range(start, min(start + _CHUNK, len(self.source))):
                    try:
                        samples.append(self.source.read(index))
                    except BadSampleError as error:
                        yield error.rejection
                for place, one in enumerate(self._described(samples) if samples else ()):
                    yield _entry(*one, Path(folder) / f"{place}") if one[1] else _unmatched(one[0], self.judge)

    @torch.no_grad()
    def _described(self, samples: Sequence[Sample]) -> list[tuple[Sample, list[str], str | None]]:
        """Samples, the captions that are kept of each, and the one of them that was written."""
        captions = [list(dict.fromkeys(sample.captions)) for sample in samples]
        written: list[str | None] = [None] * len(samples)
        if self.captioner is not None:
            own = PictureSet.of(samples, self.media, self.captioner.encoder.model.inputs)
            made = write_captions(own, self.captioner.encoder, self.captioner.objective, self.captioner.num_beams)
            written = [text if text and text not in known else None for text, known in zip(made, captions, strict=True)]
            captions = [
                known if text is None else [*known, text] for known, text in zip(captions, written, strict=True)
            ]
        kept = captions if self.judge is None else self._matching(samples, captions, self.judge)
        return [
            (sample, own, text if text in own else None)
            for sample, own, text in zip(samples, kept, written, strict=True)
        ]

    def _matching(self, samples: Sequence[Sample], captions: list[list[str]], judge: Filter) -> list[list[str]]:
        """The captions of each sample whose log odds of a match are high enough."""
        texts = [text for own in captions for text in own]
        if not texts:
            return captions
        shown = torch.tensor([place for place, own in enumerate(captions) for _ in own])
        pictures = PictureSet.of(samples, self.media, judge.encoder.model.inputs)
        odds = predict_pairs(judge.encoder, judge.objective, pictures, texts, shown, torch.arange(len(texts)))
        fits = iter((odds >= judge.least).tolist())
        return [[text for text in own if next(fits)] for own in captions]


def _entry(sample: Sample, captions: Sequence[str], written: str | None, file: Path) -> Entry:
    """A sample as a converter takes it; its picture is written into ``file``, with its extension.

    Raises:
        DataError: The source draws its pictures.
    """
    if sample.media is None:
        raise DataError(
            f"{sample.where} has no picture or clip in a file; allowed are sources that do, such as shards; write the "
            "source into shards first"
        )
    path = file.with_suffix(f".{sample.extension}")
    path.write_bytes(sample.media)
    split = sample.meta.get("split")
    meta = {name: value for name, value in sample.meta.items() if name not in ("label", "split", "written")}
    return Entry(
        path,
        f"{sample.key}.{sample.extension}",
        sample.where,
        tuple(captions),
        sample.label,
        sample.identity,
        None if split is None else str(split),
        meta if written is None else {**meta, "written": written},
    )


def _unmatched(sample: Sample, judge: Filter | None) -> Rejection:
    """Why a sample is left out."""
    none_fits = "no caption" if judge is None else f"no caption whose log odds of a match are {judge.least:g} or more"
    return Rejection("missing_caption", sample.where, none_fits)
