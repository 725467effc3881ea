"""Statistics of a stage's routers at its end, from its metrics file."""

from collections.abc import Mapping, Sequence

from engine.report.curves import Record
from engine.telemetry.console import PlainTable
from moe.config import LIMoEConfig, MoMELIMoEConfig

Sparse = LIMoEConfig | MoMELIMoEConfig

FIGURES = ("experts_used", "entropy", "confidence", "dropped")
"""Names of the figures of ``moe.routers.health.routing_health``."""

_GROUP = "metrics/router/"


def last_health(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """The last figures of each modality, by figure. A line of metrics may lack some modalities.

    Args:
        records: From ``training_records``.

    Returns:
        Empty for a stage without routers.
    """
    found: dict[str, dict[str, float]] = {}
    for record in records:
        for figure in FIGURES:
            start = f"{_GROUP}{figure}_"
            for name in (name for name in record if name.startswith(start)):
                found.setdefault(name.removeprefix(start), {})[figure] = record[name]
    return found


def health_table(health: Mapping[str, Mapping[str, float]], fillings: Sequence[Sparse], title: str) -> PlainTable:
    """One row per modality: experts used of those allowed, entropy, confidence, dropped.

    Args:
        health: From ``last_health``.
        fillings: The stage's sparse fillings.
        title: Heads the table.
    """
    table = PlainTable(title=title)
    table.add_column("modality")
    for heading in ("experts used", "entropy, nats", "confidence", "dropped"):
        table.add_column(heading, justify="right")
    for modality, figures in health.items():
        cells = {figure: "-" if figure not in figures else f"{figures[figure]:.3f}" for figure in FIGURES}
        if "experts_used" in figures:
            cells["experts_used"] = f"{figures['experts_used']:.2f} of {_experts(fillings, modality)}"
        table.add_row(modality, *cells.values())
    return table


def _experts(fillings: Sequence[Sparse], modality: str) -> str:
    """How many experts the tokens of a modality may go to; the fewest and the most where stacks differ."""
    allowed = [(ffn.allowed_experts([modality]), ffn.num_experts) for ffn in fillings]
    numbers = sorted({number if row is None else sum(row[0]) for row, number in allowed})
    return " to ".join(dict.fromkeys(str(number) for number in (numbers[0], numbers[-1])))
