"""The page of an overlap: test samples beside the training samples that are like them, in one HTML file."""

from dataclasses import dataclass
from pathlib import Path

from omnivl.data.inspect_media import has_media, thumbnail
from omnivl.data.overlap import Overlap, Pair
from omnivl.data.sources.base import BadSampleError, Source
from omnivl.pages import page_template


@dataclass(frozen=True)
class _Side:
    """A sample on the page; ``picture`` is a data URI, or empty where there is none."""

    where: str
    picture: str
    captions: tuple[str, ...]


def render_overlap(found: Overlap, train: Source, test: Source, title: str, most: int = 60) -> str:
    """The page: pairs of pictures first, each test sample with its nearest training sample, evenly chosen.

    Args:
        found: What was found.
        train: The training source.
        test: The test source.
        title: What was compared.
        most: Largest number of pairs of pictures, and of texts.
    """
    chosen = []
    for what in ("picture", "text"):
        nearest = [max(own) for (kind, _), own in sorted(found.kept.items()) if kind == what]
        nearest.sort(key=lambda pair: pair.similarity)
        count = min(most, len(nearest))
        chosen += [nearest[place * len(nearest) // count] for place in range(count)]
    rows = [
        (pair, _side(test, pair.test, pair.test_where), _side(train, pair.train, pair.train_where)) for pair in chosen
    ]
    page = page_template(Path(__file__).parent, "overlap_page.html.j2")
    figures = {name.replace("_", " "): count for name, count in found.figures().items()}
    return page.render(title=title, figures=figures, rows=rows, said=_said)


def _said(pair: Pair) -> str:
    if pair.what == "text":
        return f"equal texts: {pair.text}"
    return "the same file" if pair.identical else f"cosine {pair.similarity:.3f}"


def _side(source: Source, index: int, where: str) -> _Side:
    try:
        sample = source.read(index)
        picture = thumbnail(sample) if has_media(sample) else ""
    except BadSampleError:
        return _Side(where, "", ())
    return _Side(where, picture, sample.captions[:3])
