"""The page and the table that a run ends with."""

from engine.report.page import write_report
from engine.report.table import score_table

__all__ = ["score_table", "write_report"]
