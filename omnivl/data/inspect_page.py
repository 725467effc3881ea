"""The contact sheet: an inspection as one self-contained HTML file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omnivl.data.inspect import Inspection
from omnivl.data.inspect_media import has_media, media_facts, moves, thumbnail
from omnivl.data.sources.base import BadSampleError, Rejection, Sample
from omnivl.pages import page_template

_MAX_BARS = 14
_MAX_LABELS = 28


@dataclass(frozen=True)
class Card:
    """One sample on the sheet. ``picture`` is a data URI, or "" where ``problem`` says why there is none."""

    key: str
    picture: str
    problem: str
    is_clip: bool
    facts: str
    captions: tuple[str, ...]
    label: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram: text, count, and length relative to the longest in percent."""

    name: str
    count: int
    percent: float


@dataclass(frozen=True)
class Chart:
    """A histogram with its title and a note below it."""

    title: str
    bars: tuple[Bar, ...]
    note: str = ""


def render_page(found: Inspection) -> str:
    """The contact sheet as HTML."""
    return page_template(Path(__file__).parent, "inspect_page.html.j2").render(
        found=found,
        cards=[_card(sample) for sample in found.shown],
        charts=charts(found),
        readable_bytes=readable_bytes,
    )


def _card(sample: Sample) -> Card:
    picture, problem, facts = "", "" if has_media(sample) else "no picture", ""
    try:
        if has_media(sample):
            facts = str(media_facts(sample))
            picture = thumbnail(sample)
    except BadSampleError as error:
        problem = _problem(error.rejection)
    tags = tuple(
        f"{name}: {value}" for name in ("split", "style") if isinstance(value := sample.meta.get(name), str | int)
    )
    return Card(sample.key, picture, problem, moves(sample), facts, sample.captions[:6], sample.label or "", tags)


def _problem(rejection: Rejection) -> str:
    return f"{rejection.cause.replace('_', ' ')}: {rejection.detail}"


def charts(found: Inspection) -> list[Chart]:
    """The histograms that are not empty."""
    scanned = "" if found.scanned >= found.samples else f"of {found.scanned:,} samples spread evenly"
    frames = binned(found.frames) if len(found.frames) > _MAX_BARS else _exact(found.frames)
    drawn = [
        Chart("Kinds", bars_of(found.kinds), "what each data kind of a plan would find"),
        Chart("Size in pixels", bars_of(found.sizes, _MAX_BARS), scanned),
        Chart("Frames per clip", frames, scanned),
        Chart("Seconds per clip", binned(found.seconds), scanned),
        Chart("Words per caption", binned(found.caption_words)),
        Chart("File types", bars_of(found.extensions)),
        Chart("Further files", bars_of(found.members, _MAX_BARS), "KEY.NAME beside KEY.json"),
        Chart("Fields", _field_bars(found), "what an entry's 'text' and 'fields' can name"),
        Chart("Labels", bars_of(found.labels, _MAX_LABELS), f"different ones: {len(found.labels):,}"),
    ]
    if set(found.languages) - {""}:
        drawn.append(Chart("Languages", bars_of(found.languages, _MAX_LABELS), "captions"))
    drawn += [Chart(name, bars_of(counter, _MAX_BARS)) for name, counter in sorted(found.fields.items())]
    return [chart for chart in drawn if chart.bars]


def _field_bars(found: Inspection) -> tuple[Bar, ...]:
    """Metadata fields with the type of their values."""
    counts = {f"{name}: {kind}": count for name, types in found.field_types.items() for kind, count in types.items()}
    return bars_of(counts, _MAX_LABELS)


def bars_of(counts: Mapping[str, int], limit: int | None = None) -> tuple[Bar, ...]:
    """The largest counts first; the rest together in a last bar."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = ordered if limit is None or len(ordered) <= limit else ordered[: limit - 1]
    rest = ordered[len(kept) :]
    named = [(name or "(none)", count) for name, count in kept]
    longest = max((count for _, count in named), default=1)
    bars = [Bar(name, count, 100 * count / longest) for name, count in named]
    if rest:
        total = sum(count for _, count in rest)
        bars.append(Bar(f"{len(rest):,} others", total, min(100.0, 100 * total / longest)))
    return tuple(bars)


def _exact(counts: Mapping[int, int]) -> tuple[Bar, ...]:
    longest = max(counts.values(), default=1)
    return tuple(Bar(f"{value:g}", count, 100 * count / longest) for value, count in sorted(counts.items()))


def binned(counts: Mapping[int, int] | Mapping[float, int]) -> tuple[Bar, ...]:
    """At most about a dozen bins of a round width (1, 2 or 5 times a power of ten), in the order of their values."""
    if not counts:
        return ()
    low, high = min(counts), max(counts)
    whole = isinstance(high, int)
    step, tried = 1.0 if whole else 0.1, 0
    while (high - low) / step >= 12:
        step *= (2.0, 2.5, 2.0)[tried % 3]
        tried += 1
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[int((value + 1e-9) // step)] += count
    longest = max(bins.values())
    return tuple(
        Bar(_bin_name(number * step, (number + 1) * step, whole), count, 100 * count / longest)
        for number, count in sorted(bins.items())
    )


def _bin_name(low: float, high: float, whole: bool) -> str:
    if whole:
        return f"{low:g}" if high - low == 1 else f"{low:g} to {high - 1:g}"
    return f"{low:g} to {high:g}"


def readable_bytes(size: int) -> str:
    """E.g. ``10.5 MB``, powers of 1,000."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{size:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
