"""The parts of metrics that are equal in two equal runs."""

from pathlib import Path
from typing import Any

from engine.telemetry.metrics import read_metrics


def comparable_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` without their group ``speed``, which differs between equal runs."""
    return [{name: value for name, value in record.items() if name != "speed"} for record in read_metrics(file)]
