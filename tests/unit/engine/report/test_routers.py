"""The routers' figures at the end of a stage, as a table."""

import io

from rich.console import Console

from engine.report import health_table, last_health
from moe.config import LIMoEConfig, MoMELIMoEConfig


def test_each_modality_has_the_last_figures_that_were_written() -> None:
    records = [
        {"step": 1.0, "metrics/router/experts_used_image": 2.0, "metrics/router/experts_used_text": 1.0},
        {"step": 2.0, "metrics/router/experts_used_image": 3.0, "metrics/router/dropped_image": 0.25, "loss": 1.0},
        {"step": 3.0, "metrics/mlm/accuracy": 0.5},
    ]
    assert last_health(records) == {"image": {"experts_used": 3.0, "dropped": 0.25}, "text": {"experts_used": 1.0}}
    assert last_health(records[2:]) == {}


def test_experts_used_stand_beside_those_that_there_are() -> None:
    health = {
        "image": {"experts_used": 5.126, "entropy": 0.5, "confidence": 0.75, "dropped": 0.0},
        "text": {"experts_used": 1.0},
    }
    assert _rows(health, LIMoEConfig(num_experts=8)) == [
        ["modality", "experts", "used", "entropy,", "nats", "confidence", "dropped"],
        ["image", "5.13", "of", "8", "0.500", "0.750", "0.000"],
        ["text", "1.00", "of", "8", "-", "-", "-"],
    ]
    pools = MoMELIMoEConfig(pools={"image": 4, "text": 1}, common_experts=2)
    assert [row[1:4] for row in _rows(health, pools)[1:]] == [["5.13", "of", "6"], ["1.00", "of", "3"]]


def _rows(health: dict[str, dict[str, float]], ffn: LIMoEConfig | MoMELIMoEConfig) -> list[list[str]]:
    file = io.StringIO()
    Console(file=file, width=80).print(health_table(health, [ffn], "Routers"))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[0] == ["Routers"]
    return [line for line in lines[1:] if line and line[0] in ("modality", "image", "text")]
