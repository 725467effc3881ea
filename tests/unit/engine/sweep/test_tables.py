"""What the page of a sweep works out from its runs."""

from pathlib import Path

import pandas as pd

from engine.sweep.config import Sweep
from engine.sweep.tables import scaling


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
