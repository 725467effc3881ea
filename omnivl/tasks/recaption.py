"""Captions of a data set by trained models: one writes a caption of each picture, one keeps those that match it.

Source: Li et al., BLIP, arXiv 2201.12086, section 3.3 (CapFilt): a captioner writes a caption of each picture of the
    web, a filter takes out the texts, found and written, that do not match it by its matching head.
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
        objective: Key of an objective that predicts log odds of a match (``omnivl.tasks.needs.ScoresPairs``).
        least: Captions whose log odds of a match are below this are taken out.
    """

    encoder: Encoder
    objective: str = "vlm"
    least: float = 0.0


@dataclass(frozen=True)
class Recaptioned:
    """The samples of a source with captions written and filtered, for ``omnivl.data.convert.run.convert``.

    The caption that was written stands behind those that were found, in the sample's field ``written`` as well if it
    was kept. A sample without a caption left is rejected as ``missing_caption``, one that cannot be decoded as what it
    is, such as ``broken_image``.

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
        """Each sample with the captions that are kept, and why others are left out.

        Raises:
            DataError: The source has no files of its pictures.
            UserError: The captioner's objective writes no texts.
        """
        yield from self.source.rejections
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(self.source), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(self.source)))
                for place, found in enumerate(self._judged([self._read(index) for index in indices])):
                    if isinstance(found, Rejection):
                        yield found
                    elif found.captions:
                        yield _entry(found, Path(folder) / f"{place}")
                    else:
                        yield self._left_out(found.sample)

    def _read(self, index: int) -> Sample | Rejection:
        try:
            sample = self.source.read(index)
        except BadSampleError as error:
            return error.rejection
        if sample.media is None:
            raise DataError(
                f"{sample.where} has no picture or clip in a file; allowed are sources that do, such as shards; write "
                "the source into shards first"
            )
        return sample

    def _judged(self, read: Sequence[Sample | Rejection]) -> Iterator["_Captioned | Rejection"]:
        """Samples with their captions; of those that cannot be decoded, why."""
        samples = [one for one in read if isinstance(one, Sample)]
        try:
            found = self._captioned(samples)
        except DataError as error:
            if not isinstance(error.__cause__, BadSampleError):
                raise
            # Only now is each decoded for itself, as bad ones are few.
            judged = self.captioner or self.judge
            assert judged is not None
            reasons = iter(PictureSet.of(samples, self.media, judged.encoder.model.inputs).rejections())
            read = [(next(reasons) or one) if isinstance(one, Sample) else one for one in read]
            found = self._captioned([one for one in read if isinstance(one, Sample)])
        captioned = iter(found)
        yield from (next(captioned) if isinstance(one, Sample) else one for one in read)

    @torch.no_grad()
    def _captioned(self, samples: Sequence[Sample]) -> list["_Captioned"]:
        """Samples with the captions that are kept.

        Raises:
            DataError: A sample cannot be decoded.
        """
        if not samples:
            return []
        captions = [list(dict.fromkeys(sample.captions)) for sample in samples]
        written: list[str | None] = [None] * len(samples)
        if self.captioner is not None:
            pictures = PictureSet.of(samples, self.media, self.captioner.encoder.model.inputs)
            texts = write_captions(pictures, self.captioner.encoder, self.captioner.objective, self.captioner.num_beams)
            for place, (text, known) in enumerate(zip(texts, captions, strict=True)):
                if text and text not in known:
                    known.append(text)
                    written[place] = text
        if self.judge is not None:
            captions = self._matching(samples, captions, self.judge)
        return [
            _Captioned(sample, tuple(kept), text if text in kept else None)
            for sample, kept, text in zip(samples, captions, written, strict=True)
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

    def _left_out(self, sample: Sample) -> Rejection:
        """Why a sample without a caption is left out."""
        asked = "" if self.judge is None else f" whose log odds of a match are {self.judge.least:g} or more"
        return Rejection("missing_caption", sample.where, f"no caption{asked}")


@dataclass(frozen=True)
class _Captioned:
    """A sample with the captions that are kept.

    Attributes:
        sample: As it was read.
        captions: Those that were found, then the one that was written.
        written: The latter, if it is kept.
    """

    sample: Sample
    captions: tuple[str, ...]
    written: str | None


def _entry(found: _Captioned, file: Path) -> Entry:
    """A sample as a converter takes it; its picture is written into ``file``, with its extension."""
    sample = found.sample
    assert sample.media is not None
    path = file.with_suffix(f".{sample.extension}")
    path.write_bytes(sample.media)
    split = sample.meta.get("split")
    meta = {name: value for name, value in sample.meta.items() if name not in ("label", "split", "written")}
    return Entry(
        path,
        f"{sample.key}.{sample.extension}",
        sample.where,
        found.captions,
        sample.label,
        sample.identity,
        None if split is None else str(split),
        meta if found.written is None else {**meta, "written": found.written},
    )
