"""Sections of the page from the files of a stage and a run: hand-over, quarantine, environment, pages of tasks."""

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RunFileError
from engine.processes.files import read_whole
from omnivl.chain.names import stack_of

_ALLOWED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = "body { margin: 0; padding: 8px; font: 15px/1.5 system-ui, sans-serif; color: #111827; background: #fff; }"
_FRAME_HEAD = (
    '<!doctype html><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_ALLOWED}"><style>{_STYLE}</style>'
)

FATES = ("carried", "inflated", "resized", "created", "aside", "dropped")


def count_parts(handover: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Numbers of tensors by part of the chain and by outcome of the hand-over.

    Args:
        handover: ``handover.json``: lists of parameter names by fate.
    """
    counts: dict[str, dict[str, int]] = {}
    for fate in FATES:
        for name in handover.get(fate, ()):
            part = counts.setdefault(stack_of(name), dict.fromkeys(FATES, 0))
            part[fate] += 1
    return counts


def quarantine_counts(path: Path) -> dict[str, list[str]]:
    """Bad samples of a stage by cause, the commonest first; each as ``where: detail``.

    Args:
        path: ``quarantine.jsonl``; may be missing.
    """
    if not path.is_file():
        return {}
    lines = read_whole(path).decode("utf-8", "replace").split("\n")[:-1]  # the last one may be incomplete
    try:
        entries = [json.loads(line) for line in lines if line]
        order = Counter(entry["cause"] for entry in entries)
        return {
            cause: [f"{entry['where']}: {entry['detail']}" for entry in entries if entry["cause"] == cause]
            for cause, _ in order.most_common()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RunFileError(f"{path}: got a line that is no bad sample ({error!r}); remove the line or file") from error


@dataclass(frozen=True)
class TaskPage:
    """A page that a task has written, for a frame of the report.

    Attributes:
        title: Its title and the name of its file.
        file: The file, seen from the run's folder.
        document: What the frame shows, see ``task_pages``.
    """

    title: str
    file: str
    document: str


def task_pages(folder: Path, prefixes: Sequence[str] = ("",), run: Path | None = None) -> dict[str, list[TaskPage]]:
    """Pages of tasks in a folder: of every ``*.html`` the part from the first ``<section>`` to the last.

    Whoever wrote the run folder wrote them. The report shows each in a frame with an empty ``sandbox``, in which no
    script runs and no form is sent, and which cannot touch the page around it; the document forbids to fetch anything.

    Args:
        folder: Where the pages lie.
        prefixes: Allowed prefixes of their names. A page belongs to the longest prefix that fits.
        run: The run's folder, from which files are named; ``folder`` by default.

    Returns:
        The pages by prefix, by name.
    """
    found: dict[str, list[TaskPage]] = {prefix: [] for prefix in prefixes}
    for file in sorted(folder.glob("*.html"), key=lambda file: file.stem):
        owners = [prefix for prefix in prefixes if file.name.startswith(prefix)]
        page = _text(file) if owners else ""
        title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
        section = re.search(r"<section\b.*</section>", page, re.DOTALL)
        if title is not None and section is not None:
            name = f"{html.unescape(title[1])} ({file.name})"
            place = file.relative_to(run or folder).as_posix()
            found[max(owners, key=len)].append(TaskPage(name, place, _FRAME_HEAD + section[0]))
    return found


def _text(page: Path) -> str:
    """A page of a task; "" where a file cannot be read, which then is no page."""
    try:
        return read_whole(page).decode("utf-8", "replace")
    except OSError:
        return ""


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A tree of facts as names and texts; unknown ones are left out."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flat_facts(value, f"{prefix}{_said(name)} ")
        elif isinstance(value, list):
            flat[prefix + _said(name)] = " ".join(str(entry) for entry in value)
        elif value not in (None, ""):
            flat[prefix + _said(name)] = str(value)
    return flat


def _said(name: str) -> str:
    """A key of JSON in words, with its unit."""
    words = name.replace("_", " ")
    return words.removesuffix(" gib") + ", GiB" if words.endswith(" gib") else words.replace("tflops", "TFLOP/s")
