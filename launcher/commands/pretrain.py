"""``omnivl pretrain``: runs a plan, on this machine or as one process of another launcher."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from engine.plan.consent import require_consent
from engine.plan.parse import load_plan, plan_file
from launcher.commands.consent import AllowCommands
from launcher.start import worker
from launcher.start.discovery import join_launch
from launcher.start.here import run_here
from launcher.start.hosts import read_hostfile, run_over_hosts


def pretrain(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file, or a run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. stages.joint.optimizer.lr=2e-4", show_default=False)
    ] = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="Where the run is written; runs/NAME of the plan by default.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier start left in the folder.")] = False,
    amend: Annotated[
        bool, typer.Option("--amend", help="Change a run that has begun, where docs/plan.md says that it may.")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="Run this stage only.")] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Begin without a look at the data and the weights of all stages."),
    ] = False,
    hostfile: Annotated[
        Path | None, typer.Option(help="Machines to run on, HOST slots=N each; reached by pdsh and ssh.")
    ] = None,
    allow_commands: AllowCommands = False,
) -> None:
    """Runs a plan, or resumes a run that was interrupted. Ctrl-C saves a checkpoint first.

    Looks at every stage's data, evaluation data, weights and tokenizers before the first step.

    Examples:
      omnivl pretrain configs/plans/quickstart.yaml
      omnivl pretrain configs/plans/quickstart.yaml seed=1 --run-folder runs/seed-1
      omnivl pretrain configs/plans/quickstart.yaml --stage spatial --fresh
      omnivl pretrain runs/quickstart
      omnivl pretrain runs/quickstart stages.joint.optimizer.lr=1e-4 --amend
      torchrun --nproc-per-node 8 --no-python omnivl pretrain plan.yaml
    """
    begin = functools.partial(
        worker.worker_arguments,
        plan,
        overrides or (),
        run_folder,
        fresh=fresh,
        amend=amend,
        stage=stage,
        offline=offline,
    )
    if join_launch():  # started by torchrun, srun, mpirun ...: this is one process of several
        worker.main(begin(allow_commands=allow_commands))
    read = load_plan(plan, overrides or ())
    require_consent(read, [plan_file(plan)], overrides or (), allowed=allow_commands)
    arguments = begin(allow_commands=True)
    if hostfile is not None:
        load_plan(plan, overrides or (), sum(read_hostfile(hostfile).values()))
        run_over_hosts(hostfile, arguments)
    code = run_here(read, plan, overrides or (), arguments)
    if code:
        raise typer.Exit(code)
