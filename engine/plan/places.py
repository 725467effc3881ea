"""Where in its file each field of a plan was written, for mistakes that are found after it was read."""

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

from engine.errors import PlanError
from engine.plan.overrides import apply_overrides, expand_shorthands
from engine.plan.plan import SHARED_SECTIONS
from engine.plan.yaml import Document, Path, read_yaml, show_path
from omnivl.data.plain_files import read_small

Locate = Callable[[Path], str]
"""``file:line: path`` of a field, or the field's path alone."""


def places_of(plan: FilePath, overrides: Sequence[str] = ()) -> Locate:
    """The places of a plan's fields, as its author wrote them.

    Args:
        plan: The file.
        overrides: As ``engine.plan.parse.load_plan`` took them.

    Raises:
        PlanError: The file cannot be read any more.
    """
    document = read_yaml(read_plan_text(plan), str(plan))
    if not isinstance(document.tree, dict):
        return show_path
    expand_shorthands(document.tree)
    apply_overrides(document, overrides)

    def locate(path: Path) -> str:
        written = written_at(document, path)
        return f"{document.place(written)}: {show_path(written)}"

    return locate


def written_at(document: Document, path: Path) -> Path:
    """The path of a stage's shared field as the author wrote it: in the stage, or once for all stages."""
    if len(path) > 2 and path[0] == "stages" and path[2] in SHARED_SECTIONS and path not in document.places:
        return (str(path[2]), *path[3:])
    return path


def read_plan_text(path: FilePath) -> str:
    """The text of a plan.

    Raises:
        PlanError: It cannot be read.
    """
    try:
        return read_small(path).decode("utf-8")
    except OSError as error:
        reason = f"got a file that cannot be read ({error.strerror})"
        raise PlanError([f"{path}: {reason}; allowed a YAML file; name a plan"]) from error
    except UnicodeDecodeError as error:
        reason = f"got bytes that are no UTF-8 (at byte {error.start})"
        raise PlanError([f"{path}: {reason}; allowed UTF-8 text; save the plan as UTF-8"]) from error
