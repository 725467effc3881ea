"""What a look at a plan's inputs has found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from engine.errors import PlanError
from engine.plan.places import Locate
from engine.plan.yaml import Path
from omnivl.errors import UserError


@dataclass(frozen=True)
class Finding:
    """Something about a field of a plan.

    Attributes:
        path: The field; None where it is none.
        text: What was found there, and what to do.
    """

    path: Path | None
    text: str


@dataclass
class Look:
    """All findings of a look.

    Attributes:
        problems: Why a run would fail.
        notes: What was not looked at, and what does no harm but may not be meant.
    """

    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    @contextmanager
    def at(self, path: Path | None) -> Iterator[None]:
        """Takes a user's mistake that is raised within as a problem of a field, unless it is known already."""
        try:
            yield
        except UserError as error:
            known = {(one.path if path is not None else None, one.text) for one in self.problems}
            if (path, str(error)) not in known:
                self.problems.append(Finding(path, str(error)))

    def refuse(self, locate: Locate) -> None:
        """Raises the problems, if there are any.

        Args:
            locate: Where the plan's fields are written.

        Raises:
            PlanError: Names all of them.
        """
        if self.problems:
            raise PlanError(lines(self.problems, locate))


def lines(findings: list[Finding], locate: Locate) -> list[str]:
    """A line for each finding, each once."""
    return list(dict.fromkeys(one.text if one.path is None else f"{locate(one.path)}: {one.text}" for one in findings))


def under_heading(notes: Sequence[str]) -> list[str]:
    """Lines of notes as they are printed; none where there are no notes."""
    return ["Not looked at, or perhaps not meant:", *notes] if notes else []
