"""The command ``omnivl``: sees to it that the other packages of this one are its own, and runs ``launcher.cli``.

They are installed under the names ``moe``, ``engine`` and ``launcher``, which another package, or a file in the working
folder, may have as well. Python takes the first that it finds, and then fails far from the cause.
"""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

SIBLINGS = ("moe", "engine", "launcher")


def shadows(siblings: tuple[str, ...] = SIBLINGS) -> list[str]:
    """What stands in for packages of this one, or is going to in the processes of a run; one line each.

    Those are started with ``python -m``, which looks into the working folder first.
    """
    root, here = Path(__file__).resolve().parents[1], Path.cwd()
    found = []
    for name in siblings:
        spec = find_spec(name)
        own = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if own is None:
            found.append(f"package {name!r}: not found beside {root / 'omnivl'}; install omnivl-engine again")
        elif own.parents[1] != root:
            found.append(
                f"package {name!r}: got that of another package, {own.parent}; allowed is {root / name}; uninstall "
                "one of the two, or give this one an environment of its own"
            )
        beside = next((path for path in (here / name / "__init__.py", here / f"{name}.py") if path.is_file()), None)
        if beside is not None and here.resolve() != root:
            found.append(
                f"package {name!r}: got {beside} in the working folder, which processes of a run would take for "
                f"{root / name}; allowed is a folder without it; run the command from another folder, or rename it"
            )
    return found


def main() -> None:
    """Runs the command line; exit status 2 where something stands in for a package of this one."""
    if found := shadows():
        print("\n".join(found), file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module("launcher.cli").main()


if __name__ == "__main__":
    main()
