"""``omnivl report``: makes the page of a run again from its files, also of a run that was interrupted."""

from pathlib import Path
from typing import Annotated

import typer

from engine.report import write_report
from engine.telemetry.console import say
from omnivl.errors import UserError


def report(
    run_folder: Annotated[Path, typer.Argument(help="The run's folder, e.g. runs/quickstart.", show_default=False)],
) -> None:
    """Makes report.html of a run again, from what the run has written so far.

    Examples:
      omnivl report runs/quickstart
    """
    try:
        page = write_report(run_folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run_folder}: got a folder without {Path(error.filename).name}; allowed the folder of a run, such as "
            "runs/quickstart; name one that omnivl pretrain has written"
        ) from error
    say(f"report: {page}")
