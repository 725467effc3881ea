"""The page of a sweep: results of its runs against size, data, operations and time, with fits."""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from engine.sweep.config import Sweep
from engine.sweep.figures import HEIGHT, figures, side_by_side
from engine.sweep.tables import at_equal_cost, power_laws, run_table, scaling
from omnivl.errors import UserError
from omnivl.pages import page_template
from omnivl.shown import file_names


def write_sweep_page(sweep: Sweep, rows: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Writes ``sweep.parquet`` and ``sweep.html``.

    Args:
        sweep: What was wanted.
        rows: From ``collect``.
        folder: Where to.

    Returns:
        The page and the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "sweep.parquet", folder / "sweep.html"
    rows.to_parquet(table)
    drawn = [_html(figure) for row in figures(sweep, _complete(rows)).values() for figure in row]
    page.write_text(_render("sweep.html.j2", sweep, rows, figures=drawn, plotly=Markup(get_plotlyjs())), "utf-8")
    return page, table


def write_sweep_markdown(sweep: Sweep, rows: pd.DataFrame, folder: Path) -> Path:
    """Writes ``sweep.md`` and its pictures, an SVG file for each measure, for a repository or a wiki.

    Args:
        sweep: What was wanted.
        rows: From ``collect``.
        folder: Where to.

    Raises:
        UserError: The package that draws pictures is not installed; the tables are not written either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name.removeprefix("score/"): row for name, row in figures(sweep, _complete(rows)).items()}
    pictures = {name: f"{file}.svg" for name, file in file_names(drawn).items()}
    for name, row in drawn.items():
        picture = folder / pictures[name]
        try:
            side_by_side(row).write_image(picture)
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--markdown: got no picture from plotly ({error}); allowed is an installation of kaleido and Chrome "
                "or Chromium; pip install 'omnivl[pictures]', or leave --markdown out"
            ) from error
    page = folder / "sweep.md"
    page.write_text(_render("sweep.md.j2", sweep, rows, pictures=pictures), "utf-8")
    return page


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["state"] == "complete"]


def _render(template: str, sweep: Sweep, rows: pd.DataFrame, **more: Any) -> str:
    complete = _complete(rows)
    tables = {
        "Power laws of the loss": list(power_laws(sweep, complete)),
        "At equal cost": list(at_equal_cost(sweep, complete)),
        "Scaling over processes": scaling(sweep, complete),
        "Runs": run_table(sweep, rows),
    }
    counts = rows["state"].value_counts().to_dict()
    machines = list(dict.fromkeys(complete.get("machine", [])))
    return page_template(Path(__file__).parent / "templates", template).render(
        sweep=sweep, counts=counts, machines=machines, tables=tables, **more
    )


def _html(figure: go.Figure) -> Markup:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    written = figure.to_html(
        full_html=False, include_plotlyjs=False, config=config, default_width="100%", default_height=f"{HEIGHT}px"
    )
    return Markup(written)
