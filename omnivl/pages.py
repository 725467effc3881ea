"""Templates of pages: whatever comes from data, plans and foreign files is escaped in them."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from omnivl.shown import data_picture, markdown_text, printable


def page_template(folder: Path, name: str) -> Template:
    """A template of a page: every text in it is escaped and ``printable``, whoever wrote it, unless it is ``Markup``.

    ``NAME.html.j2`` escapes for HTML. In ``NAME.md.j2`` tables and headings use the filter ``markdown``.

    Args:
        folder: Where the templates lie.
        name: Which one.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = data_picture
    environment.filters["markdown"] = markdown_text
    return environment.get_template(name)


def _finalize(value: Any) -> Any:
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value
