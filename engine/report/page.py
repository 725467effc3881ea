"""``report.html`` of a run: one self-contained page made from the files of the run folder.

Everything on it is read back from ``plan.yaml``, ``environment.json``, ``metrics.jsonl`` and ``evaluation.json``, so it
can be made again at any time, also for a run that was cut off.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.report.curves import curves_figure, training_records
from engine.report.table import format_share


def write_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into the run folder and returns its path.

    Raises:
        FileNotFoundError: The folder is not that of a run: it holds no ``plan.yaml``.
    """
    plan = (run_folder / "plan.yaml").read_text(encoding="utf-8")
    stages = [_stage(folder) for folder in sorted((run_folder / "stages").glob("*")) if folder.is_dir()]
    templates = Environment(loader=PackageLoader("engine.report"), autoescape=select_autoescape(default=True))
    templates.filters["share"] = format_share
    page = templates.get_template("report.html.j2").render(
        name=run_folder.resolve().name,
        plan=plan,
        environment=_read_json(run_folder / "environment.json") or {},
        stages=stages,
        final=next((stage["evaluation"] for stage in reversed(stages) if stage["evaluation"]), None),
        plotly=Markup(get_plotlyjs()),
    )
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _stage(folder: Path) -> dict[str, Any]:
    """What the page shows of one stage."""
    records = training_records(folder / "metrics.jsonl")
    figures = []
    for prefix, title in (("losses/", "Losses"), ("metrics/", "Metrics"), ("speed/", "Speed")):
        if any(name.startswith(prefix) for record in records for name in record):
            figure = curves_figure(records, prefix, title)
            figures.append(Markup(figure.to_html(full_html=False, include_plotlyjs=False)))
    return {
        "name": folder.name,
        "steps": int(records[-1]["step"]) if records else 0,
        "figures": figures,
        "evaluation": _read_json(folder / "evaluation.json"),
        "handover": _read_json(folder / "handover.json"),
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
