"""What the page is told: about the run, a sentence, a picture or clip. Everything is plain containers for JSON.

One model call runs at a time. A part of an answer that the model cannot give is a sentence instead: the others are
given all the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from launcher.serve.gallery import Gallery
from launcher.serve.index import Index
from launcher.serve.media import MOST_FRAMES, Shown, animation, read_upload, thumbnail, view_of
from launcher.serve.model import Model
from omnivl.api import Routing
from omnivl.data.sources.base import BadSampleError, Sample
from omnivl.errors import UserError
from omnivl.shown import printable
from omnivl.tasks.routing.maps import NOBODY, expert_colour

Answer = dict[str, Any]
Made = TypeVar("Made")

TOP = 24
MOST_LABELS = 1_000
LONGEST_TEXT = 2_000  # characters
_SHOWN_LABELS, _VIEW, _THUMBNAIL, _VIEW_FRAMES = 8, 256, 144, 4
_COLOURS = 64
_EXAMPLES = 6


@dataclass(frozen=True)
class About:
    """What the page says about the run.

    Attributes:
        run: Its folder or its plan's name.
        stage: The stage.
        step: Optimizer steps that it took; None where that is not known.
    """

    run: str
    stage: str
    step: int | None


class Answers:
    """Answers of one model about one gallery; may be asked by several threads."""

    def __init__(self, model: Model, gallery: Gallery, index: Index | str, about: About) -> None:
        """Takes what is served.

        Args:
            model: The model.
            gallery: The pictures and clips that are searched.
            index: Searches them; or why that is not possible, a sentence.
            about: The run.
        """
        self._model, self._gallery, self._index, self._about = model, gallery, index, about
        self._one_call = Lock()

    def about(self) -> Answer:
        """The run, the gallery and what the page may ask."""
        left_out = 0 if isinstance(self._index, str) else self._index.left_out
        return {
            "run": printable(self._about.run),
            "stage": printable(self._about.stage),
            "step": self._about.step,
            "gallery": printable(self._gallery.name),
            "counts": self._gallery.counts(),
            "left_out": left_out,
            "labels": [printable(label) for label in self._gallery.labels[:MOST_LABELS]],
            "colours": ["#{:02x}{:02x}{:02x}".format(*expert_colour(expert)) for expert in range(_COLOURS)],
            "examples": self._examples(),
            "longest_text": LONGEST_TEXT,
        }

    def text(self, text: object) -> Answer:
        """Pictures and clips for a sentence, and the experts of its words.

        Raises:
            UserError: It is no sentence.
        """
        said = _sentence(text)
        return {
            "text": said,
            "results": self._part(lambda: self._search(self._call(lambda: self._model.encode_text([said]))[0])),
            "routing": self._part(lambda: self._routing(text=said)),
        }

    def upload(self, data: bytes, labels: Sequence[str] | None = None) -> Answer:
        """Everything about a picture or clip that somebody sent.

        Args:
            data: The file.
            labels: Labels to choose from; None takes the gallery's.

        Raises:
            UserError: It is no picture or clip that can be used, or labels are wrong.
        """
        return self._answer(read_upload(data), labels)

    def sample(self, number: object, labels: Sequence[str] | None = None) -> Answer:
        """Everything about a picture or clip of the gallery.

        Raises:
            UserError: There is no such number, or the sample cannot be read.
        """
        chosen = self._number(number)
        answer = self._answer(self._shown(chosen), labels)
        return {**answer, "known": _known(self._gallery.read(chosen))}

    def thumbnail(self, number: object) -> bytes:
        """A sample as a small PNG; of a clip its middle frame.

        Raises:
            UserError: See ``sample``.
        """
        shown = self._shown(self._number(number))
        return thumbnail(shown.frames[len(shown.frames) // 2], _THUMBNAIL)

    def animation(self, number: object) -> bytes:
        """A clip as a small animated WebP.

        Raises:
            UserError: See ``sample``.
        """
        return animation(self._shown(self._number(number)).frames, _THUMBNAIL)

    def _answer(self, shown: Shown, labels: Sequence[str] | None) -> Answer:
        chosen = self._gallery.labels[:MOST_LABELS] if labels is None else _labels(labels)
        given = shown.given
        encode = self._model.encode_image if shown.media == "image" else self._model.encode_video

        def search() -> list[Answer]:
            return self._search(self._call(lambda: encode([given]))[0])

        def likeliest() -> list[Answer]:
            if not chosen:
                raise UserError("labels: got none, and the data has none; write some, separated by commas")
            found = self._call(lambda: self._model.classify([given], chosen, media=shown.media))[0]
            return [{"label": printable(label), "share": share} for label, share in found[:_SHOWN_LABELS]]

        written = self._part(lambda: printable(self._call(lambda: self._model.caption([given], media=shown.media))[0]))
        read = written if isinstance(written, str) and written.strip() else None
        return {
            "media": shown.media,
            "frames": len(shown.frames),
            "views": _views(shown),
            "caption": written,
            "labels": self._part(likeliest),
            "results": self._part(search),
            "routing": self._part(lambda: self._routing(picture=given, text=read, media=shown.media)),
        }

    def _part(self, make: Callable[[], Made]) -> Made | Answer:
        """What ``make`` returns, or a sentence on why there is none."""
        try:
            return make()
        except UserError as error:
            return {"why": str(error)}

    def _call(self, ask: Callable[[], Made]) -> Made:
        with self._one_call:
            return ask()

    def _search(self, query: Any) -> list[Answer]:
        if isinstance(self._index, str):
            raise UserError(self._index)
        rows = []
        for found in self._index.search(query, TOP):
            try:
                known = _known(self._gallery.read(found.number))
            except BadSampleError:
                continue  # its shard has changed since it was embedded
            media = self._gallery.media(found.number)
            rows.append({"number": found.number, "score": found.score, "media": media, **known})
        return rows

    def _routing(self, **asked: Any) -> list[Answer]:
        found = self._call(lambda: self._model.routing(**asked))
        return _layers(found)

    def _number(self, number: object) -> int:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self._gallery):
            raise UserError(f"number: got {number!r:.60}; allowed are 0 to {len(self._gallery) - 1}")
        return number

    def _shown(self, number: int) -> Shown:
        try:
            return self._gallery.shown(number)
        except BadSampleError as error:
            raise UserError(
                f"picture: got one of the data that cannot be read ({error}); choose another one"
            ) from error

    def _examples(self) -> list[str]:
        """Some captions of the gallery, evenly chosen: sentences to begin with."""
        captions: list[str] = []
        for index in range(_EXAMPLES):
            try:
                sample = self._gallery.read(index * len(self._gallery) // _EXAMPLES)
            except BadSampleError:
                continue
            captions += [printable(sample.captions[0])[:80]] if sample.captions else []
        return list(dict.fromkeys(captions))


def _sentence(text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError("sentence: got none; type one, such as: a red heart")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"sentence: got {len(text):,} characters; allowed are {LONGEST_TEXT:,}; shorten it")
    return printable(" ".join(text.split()))


def _labels(labels: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(printable(label.strip()) for label in labels if label.strip()))
    if len(chosen) > MOST_LABELS or any(len(label) > LONGEST_TEXT for label in chosen):
        raise UserError(
            f"labels: got {len(chosen):,}; allowed are {MOST_LABELS:,} of {LONGEST_TEXT:,} characters; leave some out"
        )
    return chosen


def _known(sample: Sample) -> dict[str, str]:
    """What the data says of a sample."""
    return {
        "caption": printable(sample.captions[0])[:200] if sample.captions else "",
        "label": printable(sample.label or "")[:80],
        "key": printable(sample.key)[:80],
    }


def _views(shown: Shown) -> list[str]:
    """The picture, or some frames of the clip, evenly chosen."""
    count = min(len(shown.frames), _VIEW_FRAMES, MOST_FRAMES)
    return [view_of(shown.frames[(2 * i + 1) * len(shown.frames) // (2 * count)], _VIEW) for i in range(count)]


def _layers(routing: Routing) -> list[Answer]:
    """The layers that tokens passed, each with the share of its patches or words that each expert took."""
    layers = []
    for one in routing.layers:
        patches: list[list[list[int]]] = [] if one.patches is None else one.patches.tolist()
        words = list(zip(map(printable, routing.words), one.words, strict=False))
        experts = [expert for time in patches for row in time for expert in row] + [expert for _, expert in words]
        if not experts:
            continue
        counts: Mapping[int, int] = Counter(experts)
        layers.append(
            {
                "layer": one.layer,
                "num_experts": one.num_experts,
                "patches": patches,
                "words": [{"word": word, "expert": expert} for word, expert in words],
                "shares": [counts.get(expert, 0) / len(experts) for expert in range(one.num_experts)],
                "nobody": counts.get(NOBODY, 0) / len(experts),
            }
        )
    return layers
