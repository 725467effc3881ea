"""The page and the tables that a run ends with."""

from engine.report.curves import training_records
from engine.report.page import write_report
from engine.report.routers import health_table, last_health
from engine.report.table import score_table

__all__ = ["health_table", "last_health", "score_table", "training_records", "write_report"]
