"""``omnivl submit``: writes a job for Slurm and submits it."""

from pathlib import Path
from typing import Annotated

import typer

from engine.plan.consent import require_consent
from engine.plan.parse import load_plan, plan_file
from engine.plan.plan import Plan
from engine.run.earlier import Start
from engine.run.preflight.findings import under_heading
from engine.telemetry.console import say
from launcher.commands.consent import AllowCommands
from launcher.commands.look import Offline, look_from_here, told
from launcher.commands.resources import Resources, takes_resources
from launcher.slurm.submission import hand_in, submission_folder, write_job
from launcher.start.local import local_processes
from launcher.start.worker import chosen_folder
from omnivl.errors import UserError


@takes_resources
def submit(
    plan: Annotated[Path, typer.Argument(help="The plan, a YAML file, or a run's folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="path=value, e.g. stages.joint.optimizer.lr=2e-4", show_default=False)
    ] = None,
    resources: Resources = Resources(),  # noqa: B008 - frozen
    run_folder: Annotated[
        Path | None, typer.Option(help="Where the run is written; runs/NAME of the plan by default.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Run this stage only.")] = None,
    chain: Annotated[bool, typer.Option("--chain", help="A job for each stage, each after the one before.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier start left in the folder.")] = False,
    amend: Annotated[
        bool, typer.Option("--amend", help="Change a run that has begun, where docs/plan.md says that it may.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and print the script only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print jobs, scripts, logs and folders as JSON.")] = False,
    allow_commands: AllowCommands = False,
    offline: Offline = False,
) -> None:
    """Writes a job that runs a plan on a Slurm cluster, and submits it. After an interruption it resumes by itself.

    Looks first, from this machine, at every stage's data, evaluation data, weights and tokenizers.

    Examples:
      omnivl submit configs/plans/quickstart.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00
      omnivl submit configs/plans/quickstart.yaml --cluster configs/clusters/example.yaml --dry-run
      omnivl submit configs/plans/quickstart.yaml --chain --sbatch account=vision --json
    """
    request = resources.request(allow_commands=allow_commands)
    processes = request.processes or local_processes(load_plan(plan, overrides or ()).launch.processes, request.gpus)
    run = load_plan(plan, overrides or (), request.nodes * processes)
    require_consent(run, [plan_file(plan)], overrides or (), allowed=allow_commands)
    folder = chosen_folder(plan, run.name, run_folder).resolve()
    stages = _stages(run, stage, chain)
    if not offline:
        look = look_from_here(run, plan, request.nodes * processes, run_folder=folder, start=Start(fresh, stage, amend))
        for line in under_heading(told(look, plan, overrides or ())):
            say(line, err=True)
    written = submission_folder(folder)
    submissions = [
        write_job(
            run.name,
            [(run, folder)],
            folder,
            written,
            request,
            request.spec(request.nodes, processes, stage=name, fresh=fresh and index == 0, amend=amend),
        )
        for index, name in enumerate(stages)
    ]
    hand_in(submissions, folder, chained=True, dry_run=dry_run, as_json=as_json)


def _stages(plan: Plan, stage: str | None, chain: bool) -> list[str | None]:
    """The stage of each job; None runs all of them."""
    names = [entry.name for entry in plan.stages]
    if stage is not None and chain:
        raise UserError(f"--stage: got {stage!r} together with --chain, which runs all stages; leave one of them out")
    if stage is not None and stage not in names:
        raise UserError(f"--stage: got {stage!r}; allowed are {', '.join(names)}; name one of them")
    return [*names] if chain else [stage]
