"""Moves fields that earlier plans had in other places, so that those plans and plans of old runs can still be read."""

from collections.abc import Iterator, Mapping
from typing import Any

from engine.plan.yaml import Path, Problem, show_path, show_value
from moe.upgrades import MOVED, contradictions, upgraded

_SECTION = ("model", "ffn")


def upgrade_routers(tree: dict[str, Any], places: dict[Path, str]) -> list[Problem]:
    """Moves the options of routers below ``model.ffn.router``, where earlier plans had them in ``model.ffn``.

    Args:
        tree: A plan whose stages have their shared sections; changed in place.
        places: ``file:line`` of every value, by its path; a moved value gets the place of the earlier one.

    Returns:
        Earlier fields beside their successors.
    """
    problems: list[Problem] = []
    for path, holder in _models(tree):
        ffn = holder["model"]["ffn"]
        for name in contradictions(ffn):
            successor = show_path((*_SECTION, *MOVED[name]))
            got, change = f"{show_value(ffn[name])} beside {successor}", f"take it out: {successor} is its new name"
            problems.append(Problem((*path, *_SECTION, name), got, "one of the two", change))
        holder["model"] = {**holder["model"], "ffn": upgraded(ffn)}
    for old, place in list(places.items()):
        places.update({new: place for new in _successors(old) if new not in places})
    return problems


def _models(tree: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The parts that have a model with a filling: the plan and its stages, by their paths."""
    stages = tree.get("stages")
    holders: list[tuple[Path, Any]] = [((), tree)]
    holders += [(("stages", index), stage) for index, stage in enumerate(stages if isinstance(stages, list) else [])]
    for path, holder in holders:
        model = holder.get("model") if isinstance(holder, dict) else None
        if isinstance(model, Mapping) and isinstance(model.get("ffn"), Mapping):
            yield path, holder


def _successors(path: Path) -> Iterator[Path]:
    """The paths today that may hold the value of an earlier path."""
    for index in range(len(path) - 2):
        if path[index : index + 2] == _SECTION and path[index + 2] in MOVED:
            name, below = str(path[index + 2]), path[index + 3 :]
            yield (*path[: index + 2], *MOVED[name], *below)
            if name in ("top_k", "capacity_factor"):
                yield (*path[: index + 2], "router", "experts_per_token", *below)
