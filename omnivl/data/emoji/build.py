"""Builds the emoji set: packages in, shards, vocabulary and manifest out."""

import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import PIL
from PIL import features

from omnivl.data.emoji import join
from omnivl.data.emoji.captions import captions_of
from omnivl.data.emoji.clips import encode_clip, read_animation
from omnivl.data.emoji.corpus import vocabulary_texts
from omnivl.data.emoji.icons import read_icons
from omnivl.data.emoji.join import Concept
from omnivl.data.emoji.notice import NOTICE
from omnivl.data.emoji.packages import (
    ANIMATION_FOLDER,
    ANIMATIONS,
    DRAWINGS,
    EMOJIBASE,
    HANDS,
    PACKAGES,
    STYLES,
    Progress,
    fetch_packages,
    file_digest,
)
from omnivl.data.emoji.render import draw, encode_drawing
from omnivl.data.emoji.shards import ShardSample, WrittenShard, write_shard
from omnivl.data.emoji.split import split_families
from omnivl.data.emoji.unpack import MANIFEST
from omnivl.data.emoji.vocabulary import train_vocabulary

VOCABULARY_SIZE = 4096
CLIP_STYLE = "fluent"

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Recipe:
    """Options in which the embedded set and the full one differ.

    Attributes:
        size: Side of pictures and frames in pixels.
        num_frames: Frames kept of a clip; None keeps all.
        preset: x264's preset: slow and small, or faster where there are many large frames.
        everything: Include flags, skin tones and concepts that some style does not draw.
        all_languages: Captions in every language of emojibase, else in English only.
        concepts_per_shard: Concepts (with all their drawings and clips) per shard.
        compressed: Write ``.tar.gz``.
    """

    size: int
    num_frames: int | None
    preset: str
    everything: bool
    all_languages: bool
    concepts_per_shard: int
    compressed: bool


EMBEDDED_RECIPE = Recipe(
    96, 8, "slower", everything=False, all_languages=False, concepts_per_shard=400, compressed=True
)
FULL_RECIPE = Recipe(256, None, "medium", everything=True, all_languages=True, concepts_per_shard=256, compressed=False)


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes:
        out: Folder.
        shards: Shards written.
        concepts: Number of concepts (skin tones count on their own in the full set).
        drawings: Number of drawings by style.
        clips: Number of clips.
        splits: Number of samples by split.
        vocabulary: Number of tokens.
    """

    out: Path
    shards: tuple[WrittenShard, ...]
    concepts: int
    drawings: Mapping[str, int]
    clips: int
    splits: Mapping[str, int]
    vocabulary: int


def no_progress(what: str, done: int, total: int) -> None:
    """Ignores progress."""


def build_emoji(
    out: Path,
    packages: Path | None = None,
    full: bool = False,
    progress: Progress = no_progress,
    *,
    cache: Path = Path(".cache") / "npm",
    limit: int | None = None,
) -> BuildReport:
    """Builds the set into a folder. Equal packages and encoders give equal bytes.

    Args:
        out: Folder for the shards, ``vocab.txt``, ``NOTICE`` and ``manifest.json``; made if missing.
        packages: Folder that has the npm archives; None downloads them with ``npm pack`` into ``cache``.
        full: All drawings at 256 px, all clips with all frames, captions in all languages; plain tar files.
        progress: Called with the current activity.
        cache: Folder for downloads.
        limit: Number of concepts, evenly spread, for a test build.

    Raises:
        DataError: A package is missing, damaged or cannot be fetched.
    """
    archives = fetch_packages(packages, cache, progress)
    recipe = FULL_RECIPE if full else EMBEDDED_RECIPE
    drawings: dict[str, dict[str, bytes]] = {style: join.read_drawings(archives, style) for style in STYLES}
    core = join.core_concepts(join.read_concepts(archives[EMOJIBASE]), drawings)
    concepts = _listed(archives[EMOJIBASE], drawings) if recipe.everything else core
    splits = split_families(core)
    splits |= split_families([concept for concept in concepts if concept.family not in splits])
    if limit is not None:
        concepts = concepts[:: max(1, len(concepts) // limit)][:limit]
    clips = _encode_clips(archives, concepts, recipe, progress)
    hands = {style: read_icons(archives[package]) for style, package in HANDS.items()}
    licenses = {style: DRAWINGS[style].license for style in STYLES} | {
        style: icons.license for style, icons in hands.items()
    }
    further = {style: icons.drawings(concepts) for style, icons in hands.items()}
    texts = _Texts(archives[EMOJIBASE], splits, licenses, recipe)

    def samples_of(concept: Concept) -> list[ShardSample]:
        return [*_drawn(concept, drawings, texts, recipe.size), *_moving(concept, clips, texts)]

    def further_samples_of(concept: Concept) -> list[ShardSample]:
        return list(_drawn(concept, further, texts, recipe.size))

    out.mkdir(parents=True, exist_ok=True)
    written, counts = _write_shards(out, "emoji", concepts, samples_of, recipe, progress)
    more, more_counts = _write_shards(out, "hands", concepts, further_samples_of, recipe, progress)
    written += more
    counts += more_counts
    vocabulary = train_vocabulary(vocabulary_texts(core), VOCABULARY_SIZE)
    (out / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    report = BuildReport(
        out=out,
        shards=tuple(written),
        concepts=len(concepts),
        drawings={style: counts[f"drawing:{style}"] for style in (*STYLES, *HANDS)},
        clips=counts[f"clip:{CLIP_STYLE}"],
        splits={name.removeprefix("split:"): counts[name] for name in sorted(counts) if name.startswith("split:")},
        vocabulary=len(vocabulary),
    )
    _write_manifest(report, recipe)
    return report


def _write_shards(
    out: Path,
    name: str,
    concepts: Sequence[Concept],
    samples_of: Callable[[Concept], list[ShardSample]],
    recipe: Recipe,
    progress: Progress,
) -> tuple[list[WrittenShard], Counter[str]]:
    """Writes the shards one after the other; also counts samples by split, and by medium and style."""
    written: list[WrittenShard] = []
    counts: Counter[str] = Counter()
    suffix = ".tar.gz" if recipe.compressed else ".tar"
    for first in range(0, len(concepts), recipe.concepts_per_shard):
        part = concepts[first : first + recipe.concepts_per_shard]
        samples: list[ShardSample] = []
        for number, made in enumerate(side_by_side(samples_of, part)):
            progress(f"drawings of {name}", first + number, len(concepts))
            samples += made
        counts.update(f"split:{sample.fields['split']}" for sample in samples)
        counts.update(f"{sample.fields['medium']}:{sample.fields['style']}" for sample in samples)
        written.append(write_shard(out / f"{name}-{len(written):05d}{suffix}", samples))
    progress(f"drawings of {name}", len(concepts), len(concepts))
    return written, counts


def _listed(emojibase: Path, drawings: Mapping[str, Mapping[str, bytes]]) -> list[Concept]:
    """All emoji that some style draws, skin tones beside their concept."""
    concepts = join.read_concepts(emojibase, skin_tones=True)
    return [concept for concept in concepts if any(concept.hexcode in hexcodes for hexcodes in drawings.values())]


class _Texts:
    """The JSON fields of each concept."""

    def __init__(self, emojibase: Path, splits: Mapping[str, str], licenses: Mapping[str, str], recipe: Recipe) -> None:
        self._splits, self._licenses = splits, licenses
        self._names = (
            {language: join.read_names(emojibase, language) for language in join.languages(emojibase)}
            if recipe.all_languages
            else {}
        )

    def fields(self, concept: Concept, style: str, medium: str) -> dict[str, object]:
        captions: object = captions_of(concept.identity, concept.name, concept.tags)
        if self._names:
            captions = {
                language: captions_of(concept.identity, *names[concept.hexcode])
                for language, names in self._names.items()
                if concept.hexcode in names
            }
        return {
            "identity": concept.identity,
            "name": concept.name,
            "tags": list(concept.tags),
            "captions": captions,
            "label": concept.subgroup,
            "group": concept.group,
            "style": style,
            "medium": medium,
            "split": self._splits[concept.family],
            "family": concept.family,
            "hexcode": concept.hexcode,
            "license": self._licenses[style],
        }


def _drawn(
    concept: Concept, drawings: Mapping[str, Mapping[str, bytes]], texts: _Texts, size: int
) -> Iterator[ShardSample]:
    for style, by_hexcode in drawings.items():
        data = by_hexcode.get(concept.hexcode)
        if data is not None:
            media = encode_drawing(draw(data, size), style)
            yield ShardSample(f"{concept.hexcode}_{style}", "webp", media, texts.fields(concept, style, "drawing"))


def _moving(concept: Concept, clips: Mapping[str, bytes], texts: _Texts) -> Iterator[ShardSample]:
    if concept.hexcode in clips:
        fields = texts.fields(concept, CLIP_STYLE, "clip")
        yield ShardSample(f"{concept.hexcode}_clip", "mp4", clips[concept.hexcode], fields)


def _encode_clips(
    archives: Mapping[str, Path], concepts: Sequence[Concept], recipe: Recipe, progress: Progress
) -> dict[str, bytes]:
    """Encoded clips by hexcode of the concepts that move."""
    wanted = {concept.hexcode for concept in concepts}
    clips: dict[str, bytes] = {}

    def encode(member: tuple[str, bytes]) -> tuple[str, bytes | None]:
        clip = read_animation(member[1], recipe.size, recipe.num_frames)
        return member[0], None if clip is None else encode_clip(clip, recipe.preset)

    for number, package in enumerate(ANIMATIONS):
        progress("clips", number, len(ANIMATIONS))
        members = join.iterate_members(archives[package], ANIMATION_FOLDER, ".webp", wanted)
        clips.update((hexcode, data) for hexcode, data in side_by_side(encode, members) if data is not None)
    progress("clips", len(ANIMATIONS), len(ANIMATIONS))
    return clips


def side_by_side(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Maps a function over items with one thread per core, in the items' order; the encoders release Python's lock.

    Only a few items are taken ahead, since an animation has megabytes.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encoder_versions() -> dict[str, str]:
    """Versions of all packages that affect the bytes of the outputs."""
    try:
        import resvg_py

        resvg = str(getattr(resvg_py, "__version__", "unknown"))
    except ImportError:
        resvg = "not installed"
    codec = ".".join(str(part) for part in av.library_versions["libavcodec"])
    return {
        "pillow": PIL.__version__,
        "libwebp": str(features.version("webp")),
        "av": av.__version__,
        "libavcodec": codec,
        "resvg_py": resvg,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def _write_manifest(report: BuildReport, recipe: Recipe) -> None:
    manifest: dict[str, Any] = {
        "recipe": asdict(recipe),
        "packages": {
            package.name: {"version": package.version, "sha256": package.sha256} for package in PACKAGES.values()
        },
        "encoders": encoder_versions(),
        "concepts": report.concepts,
        "drawings": dict(report.drawings),
        "clips": report.clips,
        "splits": dict(report.splits),
        "vocabulary": report.vocabulary,
        "vocabulary_sha256": file_digest(report.out / "vocab.txt"),
        "shards": [asdict(shard) for shard in report.shards],
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (report.out / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
