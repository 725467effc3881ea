"""What the page of a sweep works out from its runs."""

from pathlib import Path

import pandas as pd

from engine.sweep.config import Sweep
from engine.sweep.tables import power_laws, scaling


def test_strong_and_weak_scaling_are_told_apart() -> None:
    sweep = Sweep("s", Path("s.yaml"), Path("p.yaml"), {"layout": {}, "size": {}}, (), 1, None)
    rows = pd.DataFrame(
        [
            ("plain", "one", 1, 64, 100.0),
            ("plain", "strong", 2, 64, 150.0),
            ("plain", "weak", 2, 128, 180.0),
            ("plain", "weak again", 2, 128, 200.0),
            ("zero", "one", 1, 64, 50.0),
            ("zero", "weak", 2, 128, 100.0),
        ],
        columns=["layout", "size", "processes", "batch", "samples_per_second"],
    ).assign(parameters=1000)
    found = [
        (row["scaling"], row["layout"], row["processes"], row["batch"], row["samples/s"], row["efficiency"])
        for row in scaling(sweep, rows)
    ]
    assert found == [
        ("strong", "plain", "1", "64", "100.0", "1.00"),
        ("strong", "plain", "2", "64", "150.0", "0.75"),
        ("weak", "plain", "1", "64", "100.0", "1.00"),
        ("weak", "plain", "2", "128", "190.0", "0.95"),
        ("weak", "zero", "1", "64", "50.0", "1.00"),
        ("weak", "zero", "2", "128", "100.0", "1.00"),
    ]
    assert scaling(sweep, rows[rows["processes"] == 1]) == []


def test_laws_of_sizes_are_fitted_through_runs_of_equal_length() -> None:
    sweep = Sweep("s", Path("s.yaml"), Path("p.yaml"), {"size": {}}, (), 1, None)
    sizes = [10_000, 20_000, 40_000, 80_000, 160_000]
    rows = pd.DataFrame(
        [
            {"parameters": size, "tokens": tokens, "flops": size * tokens, "loss": 2 + lost + (size / 1e3) ** -0.5}
            for size in sizes
            for tokens, lost in ((1000, 0.7), (4000, 0.0), (3990, 0.0))
        ]
    )
    laws = {law["against"]: law for law in power_laws(sweep, rows)}
    assert laws["parameters"]["points"] == "10"
    assert laws["parameters"]["floor"].startswith("2 ±")
    assert laws["parameters"]["exponent"].startswith("0.5 ±")
    assert laws["operations of training"]["points"] == "15"


def test_a_law_that_the_points_do_not_determine_is_not_told() -> None:
    sweep = Sweep("s", Path("s.yaml"), Path("p.yaml"), {"size": {}}, (), 1, None)
    rows = pd.DataFrame([{"seconds": seconds, "loss": 4.0} for seconds in (1.0, 2.0, 3.0, 4.0, 5.0)])
    assert list(power_laws(sweep, rows)) == []
