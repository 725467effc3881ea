"""Prints the table, or puts it between its marks in the page."""

import re
import sys

from benchmarks.published import automodel, kempner_forge, llm_foundry, megatron, open_clip, torchtitan, vit
from benchmarks.published.table import PAGE, Row, table

SOURCES = (open_clip, torchtitan, llm_foundry, kempner_forge, automodel, megatron, vit)


def rows() -> list[Row]:
    """All of the table."""
    return [row for source in SOURCES for row in source.rows()]


def main() -> None:
    """Prints the table, or puts it between its marks in the page."""
    made = table(rows())
    sys.stdout.write(made + "\n")
    if "--write" in sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        marked = re.compile(r"(<!-- published -->\n).*?(<!-- end -->)", re.S)
        PAGE.write_text(marked.sub(lambda match: f"{match[1]}{made}\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
