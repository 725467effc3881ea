"""Looks at the folder that a run is to be written to."""

import os

from engine.disk.run_folder import RunFolder, not_writable
from engine.plan.epochs import with_steps
from engine.plan.plan import Plan
from engine.plan.precision import with_precision
from engine.run.earlier import Earlier, Start
from engine.run.preflight.findings import Finding, Look


def look_at_folder(plan: Plan, run: RunFolder, look: Look, start: Start) -> None:
    """Looks whether a run can be begun or gone on with in a folder. Writes nothing.

    Args:
        plan: Without mistakes.
        run: The folder, which need not exist.
        look: Takes the findings.
        start: How the run will be started there.
    """
    with look.at(None):
        _check_writable(run)
        earlier = Earlier(run)
        known = plan if (precision := earlier.precision(start)) is None else with_precision(plan, *precision)
        _, notes = earlier.goes_on(with_steps(known, earlier.kept_steps(plan, start)), start)
        look.notes += [Finding((), text) for text in notes]
    for index, one in enumerate(plan.stages):
        if one.name != start.stage or one.init_from is None:
            continue
        before = [other.name for other in plan.stages].index(one.init_from)
        if not (weights := run.stage(before, one.init_from).weights).is_file():
            text = f"got {one.init_from!r}, which is not complete: {weights} is missing; run that stage first"
            look.problems.append(Finding(("stages", index, "init_from"), text))


def _check_writable(run: RunFolder) -> None:
    """Refuses a folder in which nothing can be written.

    Raises:
        RunFolderError: It is a file, below one, or somebody else's.
    """
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    reason = "its permissions" if there.is_dir() else "a file"
    raise not_writable(run.path, f"{there}: {reason}")
