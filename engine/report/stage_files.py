"""Sections of the page from the files of a stage and a run: hand-over, quarantine, environment, pages of tasks."""

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import RunFileError
from omnivl.chain.names import stack_of

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
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the last one may be incomplete
    try:
        entries = [json.loads(line) for line in lines if line]
        order = Counter(str(entry["cause"]) for entry in entries)
        return {
            cause: [f"{entry['where']}: {entry['detail']}" for entry in entries if entry["cause"] == cause]
            for cause, _ in order.most_common()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RunFileError(f"{path}: got a line that is no bad sample ({error!r}); remove the line or file") from error


def task_pages(folder: Path, prefixes: Sequence[str] = ("",)) -> dict[str, dict[str, str]]:
    """Contents of the tasks' pages in a folder: of every ``*.html`` the part from the first ``<section>`` to the last.

    Heads of pages are left out, and with them the drawing library, which the report has as well.

    Args:
        folder: Where the pages lie.
        prefixes: Allowed prefixes of their names. A page belongs to the longest prefix that fits.

    Returns:
        By prefix: a section of HTML by its title, both escaped already.
    """
    found: dict[str, dict[str, str]] = {prefix: {} for prefix in prefixes}
    for file in sorted(folder.glob("*.html"), key=lambda file: file.stem):
        owners = [prefix for prefix in prefixes if file.name.startswith(prefix)]
        page = file.read_text(encoding="utf-8") if owners else ""
        title = re.search(r"<title>(.*?)</title>", page)
        section = re.search(r"<section\b.*</section>", page, re.DOTALL)
        if title is not None and section is not None:
            found[max(owners, key=len)][f"{title[1]} ({html.escape(file.name)})"] = section[0]
    return found


def flat_facts(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A tree of facts as names and texts; unknown ones are left out."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flat_facts(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            flat[prefix + name] = " ".join(str(entry) for entry in value)
        elif value not in (None, ""):
            flat[prefix + name] = str(value)
    return flat
