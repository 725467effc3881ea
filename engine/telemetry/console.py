"""Consoles and tables of the command line: texts are shown as they are, whole, and harmless to the terminal.

Rich reads markup (``[bold]``) and names of emoji in strings, passes escape sequences on, and cuts what does not fit.
Here a string is a text: brackets are brackets, controls are written out, a long name goes on in the next line.
"""

import os
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from omnivl.shown import printable

_NO_LIMIT = 10_000
"""Columns where nobody looks at a screen: what reads a pipe takes long lines, and folds them as it likes."""


class PlainConsole(Console):
    """A console whose strings are texts, not markup, and which writes controls of texts out.

    Into a pipe or a file, lines are as long as they need to be, unless ``COLUMNS`` says otherwise.
    """

    def __init__(
        self, *, stderr: bool = False, file: IO[str] | None = None, width: int | None = None, quiet: bool = False
    ) -> None:
        """Opens it.

        Args:
            stderr: Standard error instead of standard output.
            file: Where to write instead.
            width: Columns; those of the terminal by default.
            quiet: Whether it shows nothing.
        """
        super().__init__(stderr=stderr, file=file, width=width, quiet=quiet, markup=False, emoji=False, highlight=False)
        if width is None and not self.is_terminal and not os.environ.get("COLUMNS"):
            self.width = _NO_LIMIT

    def render_str(self, text: str, **options: Any) -> Text:
        """See ``Console``."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See ``Console``; the last place that every text passes."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style, segment.control)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """See ``Console``; a string is a text here too."""
        return super().status(plain_text(status), **options)


class PlainTable(Table):
    """A table whose strings are texts on any console, and in which none is cut: what is too long is folded."""

    def __init__(self, *headings: str, title: str | None = None, **options: Any) -> None:
        """Headings of columns to the left (``add_column`` adds others), and options of ``Table``."""
        look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 2, 0, 0)}
        heading = None if title is None else plain_text(title, keep="\n")
        super().__init__(title=heading, title_justify="left", **look | options)
        for one in headings:
            self.add_column(one)

    def add_column(self, header: RenderableType = "", *arguments: Any, **options: Any) -> None:
        """See ``Table``."""
        super().add_column(plain_text(header, keep="\n"), *arguments, **{"overflow": "fold", **options})

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """See ``Table``."""
        for _ in cells[len(self.columns) :]:
            self.add_column()
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See ``Table``."""
        return super().__rich_console__(console, options.update(markup=False))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """See ``Table``."""
        return super().__rich_measure__(console, options.update(markup=False))


def titled(title: object, rest: object = "") -> Text:
    """A line that begins with a bold title."""
    return Text.assemble((printable(title), "bold"), printable(rest))


def plain_text(cell: Any, *, keep: str = "") -> Any:
    """A string as a text without markup; other things that Rich can print stay."""
    return Text(printable(cell, keep=keep), overflow="fold") if isinstance(cell, str) else cell


def say(text: object, *, err: bool = False) -> None:
    """Prints a line on standard output or standard error, whatever letters that knows."""
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"
    line = printable(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=stream, flush=True)
