"""Builds shards of all icon sets: the package in; shards, a notice of licences and a manifest out."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omnivl.data.emoji.build import encoder_versions, no_progress
from omnivl.data.emoji.packages import Progress, file_digest
from omnivl.data.emoji.shards import read_shard
from omnivl.data.emoji.unpack import MANIFEST, embedded_shards
from omnivl.data.icons.crew import Crew
from omnivl.data.icons.job import PARTS, Part, Refusal, ShardJob, read_part, replace_file
from omnivl.data.icons.names import held_out_names
from omnivl.data.icons.notice import notice_of
from omnivl.data.icons.package import find_package, iterate_sets, read_infos
from omnivl.data.icons.samples import HeldOut, drawings_of, samples_of
from omnivl.data.icons.sets import Group, SetInfo
from omnivl.errors import DataError

NOTICE = "NOTICE"
RECIPE = "recipe.json"
REFUSED = "refused.jsonl"
SAMPLES_PER_SHARD = 4000
"""Below the number of different values up to which a loader can filter by a field."""
FORMAT = 1
"""To be raised when the same options give other samples."""


@dataclass(frozen=True)
class IconOptions:
    """What is built.

    Attributes:
        groups: Groups of licences whose sets are used.
        sets: Prefixes of the only sets that are used; empty for all.
        size: Side of the pictures in pixels.
        seed: Of the colours of monochrome icons.
    """

    groups: tuple[Group, ...] = ("free",)
    sets: tuple[str, ...] = ()
    size: int = 96
    seed: int = 0


@dataclass(frozen=True)
class IconReport:
    """The result of a build.

    Attributes:
        out: Folder.
        icons: Number of samples.
        counts: Samples by ``set``, ``license``, ``hand`` and ``split``.
        refused: Icons that could not be drawn, by cause.
        left_out: Why a set was not used, by prefix.
        shards: Number of shards.
        bytes: Of all shards.
        cpu_seconds: Of this call in all processes.
    """

    out: Path
    icons: int
    counts: Mapping[str, Mapping[str, int]]
    refused: Mapping[str, int]
    left_out: Mapping[str, str]
    shards: int
    bytes: int
    cpu_seconds: float


def build_icons(
    out: Path,
    package: Path | None = None,
    options: IconOptions = IconOptions(),
    *,
    processes: int | None = None,
    progress: Progress = no_progress,
    cache: Path = Path(".cache") / "npm",
) -> IconReport:
    """Builds the shards. The same package, options and encoders give the same bytes.

    Shards that an interrupted build of the same kind has left are kept; a build that is complete is not repeated.

    Args:
        out: Folder for the shards, ``NOTICE``, ``manifest.json`` and ``refused.jsonl``; made if missing.
        package: Archive or folder of it, see ``find_package``.
        options: What is built.
        processes: Number of processes; None takes one per core.
        progress: Called with the current activity.
        cache: Folder for the download.

    Raises:
        DataError: The package is missing or damaged, the folder holds something else, a set is unknown, or no icon
            could be drawn.
    """
    start = time.process_time()
    if find_spec("resvg_py") is None:
        raise DataError("resvg-py is not installed, which draws the icons; install the extra 'data'")
    archive = find_package(package, cache)
    recipe = _recipe(archive, options)
    if _take_folder(out, recipe):
        return _report(out, time.process_time() - start)
    infos = read_infos(archive)
    used, left_out = _chosen(archive, infos, options)
    held_out = _held_out(archive, used, progress)
    refusals: list[Refusal] = []
    parts: dict[str, Part] = {}

    def missing() -> Iterator[ShardJob]:
        for job in _jobs(archive, used, held_out, out, options, refusals):
            part = read_part(job)
            if part is None:
                yield job
            else:
                parts[job.path.name] = part

    total, done = sum(info.total for info in used.values()), 0
    progress("icons", 0, total)
    for job, part in Crew(missing(), processes or len(os.sched_getaffinity(0))).parts():
        parts[job.path.name] = part
        done += len(job.icons)
        progress("icons", done, total)
    progress("icons", total, total)
    ordered = [parts[name] for name in sorted(parts)]
    _finish(out, recipe, infos, left_out, ordered, refusals)
    return _report(out, time.process_time() - start + sum(part.seconds for part in ordered))


def _recipe(archive: Path, options: IconOptions) -> dict[str, Any]:
    """All that the bytes depend on."""
    return {
        "format": FORMAT,
        "package": file_digest(archive),
        "groups": sorted(options.groups),
        "sets": sorted(options.sets),
        "size": options.size,
        "seed": options.seed,
        "encoders": encoder_versions(),
    }


def _take_folder(out: Path, recipe: Mapping[str, Any]) -> bool:
    """Makes the folder this build's. Whether the build is complete already.

    Raises:
        DataError: Something else is in it.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"the output {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        complete = (out / MANIFEST).is_file()
        try:
            text = (out / (MANIFEST if complete else RECIPE)).read_text(encoding="utf-8")
            found = json.loads(text)["recipe"] if complete else json.loads(text)
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, dict):
            raise DataError(f"the output folder {out} is not empty and holds no icons; choose another one")
        differing = sorted(name for name in recipe.keys() | found.keys() if recipe.get(name) != found.get(name))
        if differing:
            raise DataError(
                f"the output folder {out} holds icons that were built with other {', '.join(differing)}; choose "
                f"another folder, or empty it yourself"
            )
        return complete
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / RECIPE, json.dumps(recipe, indent=1))
    return False


def _chosen(
    archive: Path, infos: Mapping[str, SetInfo], options: IconOptions
) -> tuple[dict[str, SetInfo], dict[str, str]]:
    """The sets that are used, and why others are not."""
    unknown = sorted(set(options.sets) - set(infos))
    if unknown:
        raise DataError(f"{archive}: no set {unknown[0]!r}; it has {len(infos)}, such as {', '.join([*infos][:5])}")
    reasons = {prefix: info.reason_to_leave_out(options.groups) for prefix, info in infos.items()}
    left_out = {prefix: reason for prefix, reason in reasons.items() if reason is not None}
    refused = next((prefix for prefix in options.sets if prefix in left_out), None)
    if refused is not None:
        raise DataError(f"set {refused!r} is left out: {left_out[refused]}; name other sets or further licences")
    wanted = options.sets or tuple(infos)
    used = {prefix: info for prefix, info in infos.items() if prefix in wanted and prefix not in left_out}
    if not used:
        raise DataError(f"{archive}: none of its {len(infos)} sets is used; name further licences")
    return used, left_out


def _held_out(archive: Path, used: Mapping[str, SetInfo], progress: Progress) -> HeldOut:
    unseen = [prefix for prefix, info in used.items() if info.unseen]
    drawings: set[bytes] = set()
    for number, (_, tree) in enumerate(iterate_sets(archive, unseen)):
        progress("unseen hands", number, len(unseen))
        drawings |= set() if isinstance(tree, str) else drawings_of(tree)
    progress("unseen hands", len(unseen), len(unseen))
    embedded = (sample.fields for shard in embedded_shards() for sample in read_shard(shard))
    return HeldOut(held_out_names((str(fields["name"]), str(fields["split"])) for fields in embedded), drawings)


def _jobs(
    archive: Path,
    used: Mapping[str, SetInfo],
    held_out: HeldOut,
    out: Path,
    options: IconOptions,
    refusals: list[Refusal],
) -> Iterator[ShardJob]:
    """All shards, set by set in the archive's order. What is damaged is appended to ``refusals``."""
    for prefix, tree in iterate_sets(archive, used):
        if isinstance(tree, str):
            refusals.append(Refusal(prefix, "damaged", tree))
            continue
        tasks, damaged = samples_of(used[prefix], tree, held_out)
        refusals += damaged
        for number, first in enumerate(range(0, len(tasks), SAMPLES_PER_SHARD)):
            icons = tuple(tasks[first : first + SAMPLES_PER_SHARD])
            yield ShardJob(prefix, out / f"{prefix}-{number:03d}.tar", icons, options.size, options.seed)


def _finish(
    out: Path,
    recipe: Mapping[str, Any],
    infos: Mapping[str, SetInfo],
    left_out: Mapping[str, str],
    parts: Sequence[Part],
    refusals: Sequence[Refusal],
) -> None:
    """Writes what describes the shards, the manifest last, and removes what only an interrupted build needs.

    Raises:
        DataError: There is no sample.
    """
    refused = sorted([*refusals, *(one for part in parts for one in part.refusals)], key=lambda one: one.where)
    shards = [part.shard for part in parts if part.shard is not None]
    if not shards:
        first = f"; the first: {refused[0].where}: {refused[0].detail}" if refused else ""
        raise DataError(f"{out}: no icon could be drawn{first}")
    counted: dict[str, Counter[str]] = {}
    for part in parts:
        for name, count in part.counts.items():
            field, _, value = name.partition(":")
            counted.setdefault(field, Counter())[value] += count
    (out / NOTICE).write_text(notice_of(infos, counted["set"]), encoding="utf-8")
    lines = (json.dumps(asdict(one), ensure_ascii=False) for one in refused)
    (out / REFUSED).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    manifest = {
        "recipe": recipe,
        "icons": sum(shard.samples for shard in shards),
        "counts": {field: dict(sorted(values.items())) for field, values in sorted(counted.items())},
        "refused": dict(sorted(Counter(one.cause for one in refused).items())),
        "left_out": left_out,
        "shards": [asdict(shard) for shard in shards],
    }
    replace_file(out / MANIFEST, f"{json.dumps(manifest, indent=1, ensure_ascii=False)}\n")
    shutil.rmtree(out / PARTS)
    (out / RECIPE).unlink()


def _report(out: Path, cpu_seconds: float) -> IconReport:
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    return IconReport(
        out=out,
        icons=manifest["icons"],
        counts=manifest["counts"],
        refused=manifest["refused"],
        left_out=manifest["left_out"],
        shards=len(manifest["shards"]),
        bytes=sum(shard["bytes"] for shard in manifest["shards"]),
        cpu_seconds=cpu_seconds,
    )
