"""``report.html`` of a run: one self-contained page made from the files of the run folder.

It is made from the files that the run has written, so that it can be made again at any time, also for a run that was
interrupted. It loads nothing over the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.disk.rollback import read_rollbacks
from engine.disk.run_folder import RunFolder, StageFolder
from engine.plan.yaml import read_yaml
from engine.processes.files import read_json
from engine.report.curves import evaluation_records, panel_figure, panels_of, scores_figure, training_records
from engine.report.stage_files import count_parts, flat_facts, quarantine_counts, task_pages
from engine.report.table import format_share

_HEADLINE = ("started", "processes", "cpu", "gpu", "torch", "deepspeed")


def write_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into the run folder and returns its path.

    Raises:
        FileNotFoundError: The folder is not that of a run: ``plan.yaml`` or ``environment.json`` is missing.
    """
    run = RunFolder(run_folder)
    plan = run.plan.read_text(encoding="utf-8")
    run.environment.stat()  # missing is another mistake than damaged
    environment = read_json(run.environment, dict, "start the run again, which writes it anew")
    folders = [folder for folder in sorted((run_folder / "stages").glob("*")) if folder.is_dir()]
    templates = Environment(
        loader=PackageLoader("engine.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["share"] = format_share
    page = templates.get_template("report.html.j2").render(
        name=_plan_name(plan) or run_folder.resolve().name,
        headline={key: environment[key] for key in _HEADLINE if environment.get(key)},
        evaluations=_evaluations(run_folder, folders),
        stages=[_stage(StageFolder(folder)) for folder in folders],
        plan=plan,
        environment=flat_facts(environment),
        plotly=Markup(get_plotlyjs()),
    )
    path = run.report
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    beside.rename(path)
    return path


def _plan_name(plan: str) -> str | None:
    tree = read_yaml(plan).tree
    return tree.get("name") if isinstance(tree, dict) else None


def _evaluations(run_folder: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """The last stage's evaluation first, then those of earlier stages, then those of ``omnivl evaluate``."""
    found = []
    for folder in reversed(folders):
        if (read := _read_json(StageFolder(folder).evaluation)) is not None:
            title = f"stage {folder.name.partition('-')[2]}, after step {read['step']}"
            found.append({"title": title, "pages": {}, **read})
    files = sorted(run_folder.glob("evaluation-*.json"))
    pages = task_pages(run_folder, [f"{file.stem}-" for file in files])
    for file in files:
        read = _read_json(file)
        title = f"stage {read['stage']}, evaluated again ({file.name})"
        found.append({"title": title, "pages": _marked_up(pages[f"{file.stem}-"]), **read})
    return found


def _stage(folder: StageFolder) -> dict[str, Any]:
    """What the page shows of one stage."""
    records = training_records(folder.metrics)
    scores = evaluation_records(folder.metrics)
    figures = [_html(panel_figure(records, panel, names), 300) for panel, names in panels_of(records)]
    handover: Mapping[str, Any] | None = _read_json(folder.handover)
    return {
        "name": folder.path.name,
        "steps": int(records[-1]["step"]) if records else 0,
        "complete": folder.completed_steps() is not None,
        "skipped": int(records[-1].get("skipped", 0)) if records else 0,
        "rollbacks": read_rollbacks(folder.rollbacks),
        "figures": figures,
        "scores": _html(scores_figure(scores), 380) if len(scores) > 1 and any(len(one) > 1 for one in scores) else "",
        "handover": handover,
        "parts": count_parts(handover) if handover is not None else {},
        "quarantine": quarantine_counts(folder.quarantine),
        "pages": _marked_up(task_pages(folder.path)[""]),
    }


def _html(figure: go.Figure, height: int) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    written = figure.to_html(
        full_html=False, include_plotlyjs=False, config=config, default_width="100%", default_height=f"{height}px"
    )
    return Markup(written)


def _marked_up(sections: Mapping[str, str]) -> dict[Markup, Markup]:
    return {Markup(title): Markup(section) for title, section in sections.items()}


def _read_json(path: Path) -> Any:
    return read_json(path, dict, "remove it: the page does without") if path.exists() else None
