"""``report.html`` of a run: one self-contained page made from the files of the run folder.

It is made from the files that the run has written, so that it can be made again at any time, also for a run that was
interrupted. It loads nothing over the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.disk.rollback import read_rollbacks
from engine.disk.run_folder import RunFolder, StageFolder, write_whole
from engine.plan.yaml import read_yaml
from engine.processes.files import read_json, read_whole
from engine.report.curves import changes, evaluation_records, panel_figure, scores_figure, split_flat, training_records
from engine.report.learning import StageCurve, learning_figure, learning_text
from engine.report.run_files import REMEDY, RunFiles, read_evaluation, read_handover
from engine.report.stage_files import count_parts, flat_facts, quarantine_counts, task_pages
from engine.report.summary import PlannedStage, leading_scores, planned_stages, run_state, stage_line
from engine.report.table import format_interval, format_metric, format_share
from engine.telemetry.curve import read_curve
from engine.watch.failure import read_failure
from omnivl.pages import page_template

_HEADLINE = ("started", "processes", "cpu", "gpu", "torch", "deepspeed")


def write_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into the run folder and returns its path.

    Raises:
        FileNotFoundError: The folder is not that of a run: ``plan.yaml`` or ``environment.json`` is missing.
        RunFileError: The page cannot be written.
    """
    run = RunFolder(run_folder)
    for file in (run.plan, run.environment):
        file.lstat()  # a folder without it is no run's
    files = RunFiles(run_folder)
    plan = files.read(run.plan, lambda path: read_whole(path).decode("utf-8", "replace"), "")
    environment: dict[str, Any] = files.read(run.environment, lambda path: read_json(path, dict, REMEDY), {})
    tree = files.read(run.plan, lambda path: read_yaml(plan).tree, None)
    folders = [folder for folder in sorted((run_folder / "stages").glob("*")) if folder.is_dir()]
    stages = {folder.name: _stage(StageFolder(folder), files, run_folder) for folder in folders}
    evaluations = _evaluations(run_folder, folders, files)
    planned = {run.stage(index, one.name).path.name: one for index, one in enumerate(planned_stages(tree))}
    planned |= {name: PlannedStage(name.partition("-")[2] or name, None) for name in stages if name not in planned}
    lines = {name: stage_line(i, one, stages.get(name)) for i, (name, one) in enumerate(planned.items(), 1)}
    curves = _curves(run, files, planned, stages)
    failure = files.read(run_folder / "failure.json", lambda path: read_failure(path.parent), None)
    page = page_template(Path(__file__).parent / "templates", "report.html.j2").render(
        name=(tree.get("name") if isinstance(tree, dict) else None) or run_folder.resolve().name,
        state=run_state(list(lines.values()), failure),
        damaged=files.damaged,
        lines=list(lines.values()),
        leading=leading_scores(evaluations[0] if evaluations else None),
        share=format_share,
        metric=format_metric,
        interval=format_interval,
        headline=flat_facts({key: environment[key] for key in _HEADLINE if environment.get(key)}),
        evaluations=evaluations,
        curve=_html(learning_figure(curves), 380) if curves else "",
        curve_text=learning_text(curves),
        stages=[{**stage, "line": lines[name]} for name, stage in stages.items()],
        plan=plan,
        environment=flat_facts(environment),
        plotly=Markup(get_plotlyjs()),
    )
    write_whole(run.report, page)
    return run.report


def _evaluations(run_folder: Path, folders: list[Path], files: RunFiles) -> list[dict[str, Any]]:
    """The last stage's evaluation first, then those of earlier stages, then those of ``omnivl evaluate``."""
    found = []
    for folder in reversed(folders):
        if read := files.read(StageFolder(folder).evaluation, read_evaluation, {}):
            title = f"stage {folder.name.partition('-')[2]}, after step {read['step']}"
            found.append({**read, "title": title, "pages": []})
    again = sorted(run_folder.glob("evaluation-*.json"))
    pages = task_pages(run_folder, [f"{file.stem}-" for file in again])
    for file in again:
        if read := files.read(file, read_evaluation, {}):
            title = f"stage {read['stage']}, evaluated again ({file.name})"
            found.append({**read, "title": title, "pages": pages[f"{file.stem}-"]})
    return found


def _curves(
    run: RunFolder, files: RunFiles, planned: Mapping[str, PlannedStage], stages: Mapping[str, Any]
) -> list[StageCurve]:
    """The curves of the stages that have one, each behind the steps of all earlier stages."""
    found, before = [], 0
    for folder, one in planned.items():
        if points := files.read(StageFolder(run.path / "stages" / folder).curve, read_curve, []):
            found.append(StageCurve(one.name, before, points))
        before += one.steps or stages.get(folder, {}).get("steps", 0)
    return found


def _stage(folder: StageFolder, files: RunFiles, run_folder: Path) -> dict[str, Any]:
    """What the page shows of one stage."""
    records = files.read(folder.metrics, training_records, [])
    scores = files.read(folder.metrics, evaluation_records, []) if records else []
    drawn, flat = split_flat(records)
    figures = [_html(panel_figure(records, panel, names), 300) for panel, names in drawn]
    tested = sorted({name for one in scores for name in one if name != "step"})
    moving = [name for name in tested if changes(scores, name)]
    if len(scores) > 1:
        flat |= {f"Score, {name}": scores[-1][name] for name in tested if name not in moving and name in scores[-1]}
    handover: Mapping[str, Any] = files.read(folder.handover, read_handover, {})
    completed: int | None = files.read(folder.path / "complete.json", lambda _: folder.completed_steps(), None)
    return {
        "records": records,
        "steps": int(records[-1]["step"]) if records else 0,
        "complete": completed is not None,
        "skipped": int(records[-1].get("skipped", 0)) if records else 0,
        "rollbacks": files.read(folder.rollbacks, read_rollbacks, ()),
        "figures": figures,
        "flat": {name: f"{value:.4g}" for name, value in flat.items()},
        "scores": _html(scores_figure(scores, moving), 380) if moving else "",
        "handover": handover,
        "parts": count_parts(handover),
        "quarantine": files.read(folder.quarantine, quarantine_counts, {}),
        "pages": task_pages(folder.path, run=run_folder)[""],
    }


def _html(figure: go.Figure, height: int) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    written = figure.to_html(
        full_html=False, include_plotlyjs=False, config=config, default_width="100%", default_height=f"{height}px"
    )
    return Markup(written)
