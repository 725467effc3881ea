"""``omnivl.train``: runs a plan on this machine from a program or a notebook."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import RunError
from engine.finished.load import load
from engine.plan.consent import require_consent
from engine.plan.parse import load_plan, plan_file
from launcher.start.here import run_here
from launcher.start.worker import chosen_folder, worker_arguments
from omnivl.api import Model


def train(
    plan: str | Path,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    run_folder: str | Path | None = None,
    fresh: bool = False,
    allow_commands: bool = False,
) -> Model:
    """Runs a plan on this machine as ``omnivl pretrain`` does, or resumes its run, and loads what it has trained.

    Progress is printed. Interrupting it (Ctrl-C, a notebook's stop) saves a checkpoint, from which the same call goes
    on.

    Args:
        plan: A YAML file, or a run's folder.
        overrides: Other values of the plan, as ``{"stages.joint.optimizer.lr": 2e-4}`` or ``["seed=1"]``.
        run_folder: Where the run is written; ``runs/NAME`` of the plan by default.
        fresh: Delete what an earlier start left in the folder.
        allow_commands: Let files of another user run commands, fetch addresses and expand globs.

    Returns:
        The last stage that is complete; the run's folder keeps the report and everything else.

    Raises:
        UserError: The plan is wrong, or its data or weights cannot be read.
        RunError: The run ended before its last step.
    """
    path, folder = Path(plan).expanduser(), None if run_folder is None else Path(run_folder).expanduser()
    said = overrides
    if isinstance(said, Mapping):
        said = [f"{name}={json.dumps(value)}" for name, value in said.items()]
    read = load_plan(path, said)
    require_consent(read, [plan_file(path)], said, allowed=allow_commands)
    arguments = worker_arguments(path, said, folder, fresh=fresh, allow_commands=True)
    chosen = chosen_folder(path, read.name, folder)
    if code := run_here(read, path, said, arguments):
        how = f"was stopped by signal {code - 128}" if code > 128 else f"failed with exit status {code}"
        raise RunError(
            f"{chosen}: the run {how}, and has said why above; mend that, and give the same call again, which goes on "
            "from its newest whole checkpoint"
        )
    return load(chosen)
