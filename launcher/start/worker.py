"""One process of a run.

``python -m launcher.start.worker PLAN [key=value ...] --run-folder F [--fresh] [--amend] [--stage NAME] [--offline]
[--allow-commands]``

Started by ``launcher.start.local``, or by any launcher that ``launcher.start.discovery`` knows.
"""

import argparse
import errno
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from engine.errors import unwritable
from engine.hosts import needs_process_group
from engine.plan.consent import require_consent
from engine.plan.parse import load_plan, plan_file
from engine.processes.memory import keep_freed_memory
from engine.processes.process_group import finish, join_process_group, launched_processes
from engine.processes.variables import LaunchError
from engine.run.earlier import Start
from engine.run.entrance import RunOptions
from engine.run.train import train
from engine.watch.failure import DEBUG, Failure, describe_error
from launcher.start.discovery import BY_DEEPSPEED, join_launch
from omnivl.errors import UserError

_REPORT_DELAY_SECONDS = 0.25
"""Seconds that a failed process waits before it reports. If another one failed first, the launcher ends this one
meanwhile, so that only the first failure is reported."""

_REPORT_DELAY_SECONDS_DEEPSPEED = 1.5
"""The same under deepspeed's launcher, which looks at its ranks once a second."""

_NO_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Errors of the operating system that say that a file system takes no more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the worker and exits: 0 done, 2 user's mistake, 1 other failure, 128 + n stopped by signal n."""
    end_process(lambda: run_worker(sys.argv[1:] if arguments is None else arguments))


def end_process(action: Callable[[], int]) -> NoReturn:
    """Runs ``action`` in one process of a launch and exits; ``action`` returns 0 or the number of a signal."""
    # DeepSpeed calls collectives by names that torch renames, once per step and layer
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    try:
        code = action()
    except LaunchError as error:  # of the cluster rather than of the user
        Failure(1, describe_error(error)).tell()
        finish(1)
    except UserError as error:
        Failure(2, describe_error(error)).tell()
        finish(2)
    except BaseException as error:
        time.sleep(_REPORT_DELAY_SECONDS_DEEPSPEED if BY_DEEPSPEED in os.environ else _REPORT_DELAY_SECONDS)
        rank = int(os.environ.get("RANK", "0"))
        Failure(1, f"rank {rank} failed{_said_of(error)}", rank).tell()
        finish(1)
    if code == 0:
        finish(0)
    finish(128 + code)


def _said_of(error: BaseException) -> str:
    """What follows "failed": the traceback, or a sentence where the disk is to blame."""
    if isinstance(error, OSError) and error.errno in _NO_STORAGE and DEBUG not in os.environ:
        return f": {unwritable(error.filename or 'a file of the run', error)}"
    return ":\n" + "".join(traceback.format_exception(error))


def run_worker(arguments: Sequence[str]) -> int:
    """Reads the plan, joins the others, trains; returns 0 or the number of the signal that ended the run early."""
    options = _parser().parse_args(arguments)
    join_launch(by_hand=False)
    plan = load_plan(options.plan, options.overrides, launched_processes())
    require_consent(plan, [plan_file(options.plan)], options.overrides, allowed=options.allow_commands)
    always = any(needs_process_group(stage.parallel) for stage in plan.stages)
    device = join_process_group(plan.launch.timeout_seconds, always=always)
    keep_freed_memory(device)
    folder = chosen_folder(options.plan, plan.name, options.run_folder)
    run = RunOptions(
        folder,
        Start(options.fresh, options.stage, options.amend),
        offline=options.offline,
        plan_file=plan_file(options.plan),
        overrides=tuple(options.overrides),
    )
    return train(plan, run, device)


def chosen_folder(plan: Path, name: str, given: Path | None) -> Path:
    """The folder of a run: the one given, the run whose plan it is, or ``runs/NAME``."""
    return given or (plan if plan.is_dir() else Path("runs") / name)


def worker_arguments(
    plan: Path,
    overrides: Sequence[str],
    run_folder: Path | None,
    *,
    fresh: bool = False,
    amend: bool = False,
    stage: str | None = None,
    offline: bool = False,
    allow_commands: bool = False,
) -> list[str]:
    """The command line that ``run_worker`` reads back; ``allow_commands`` where the plan's sources were looked at."""
    flags = [] if run_folder is None else ["--run-folder", str(run_folder)]
    given = {"--fresh": fresh, "--amend": amend, "--offline": offline, "--allow-commands": allow_commands}
    flags += [flag for flag, is_given in given.items() if is_given]
    flags += [] if stage is None else ["--stage", stage]
    return [*flags, "--", str(plan), *overrides]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launcher.start.worker")
    parser.add_argument("plan", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--amend", action="store_true")
    parser.add_argument("--stage")
    parser.add_argument("--allow-commands", action="store_true")
    return parser


if __name__ == "__main__":
    main()
