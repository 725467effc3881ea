"""What the page of a sweep works out from its runs."""

from pathlib import Path

import pandas as pd

from engine.sweep.config import Sweep
from engine.sweep.tables import at_equal_cost, power_laws, scaling


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


def test_a_law_that_the_points_do_not_determine_is_said_to_be_so() -> None:
    sweep = Sweep("s", Path("s.yaml"), Path("p.yaml"), {"size": {}}, (), 1, None)
    rows = pd.DataFrame([{"seconds": seconds, "loss": 4.0} for seconds in (1.0, 2.0, 3.0, 4.0, 5.0)])
    unknown = dict.fromkeys(("floor", "scale", "exponent"), "not determined")
    of = {"of": "all runs", "against": "seconds of steps"}
    assert list(power_laws(sweep, rows)) == [{**of, "points": "5", **unknown}]
    few = pd.DataFrame([{"seconds": seconds, "loss": 4.0 / seconds} for seconds in (1.0, 2.0, 3.0)])
    assert list(power_laws(sweep, few)) == [{**of, "points": "3", **unknown}]
    noisy = pd.DataFrame([{"seconds": float(i), "loss": loss} for i, loss in enumerate((3.0, 3.4, 2.9, 3.3, 3.0), 1)])
    assert next(power_laws(sweep, noisy))["exponent"] == "not determined", "its interval holds 0"


def test_curves_at_equal_cost_say_where_one_is_not_determined() -> None:
    sweep = Sweep("s", Path("s.yaml"), Path("p.yaml"), {"ffn": {}}, (), 1, "ffn")
    known = [{"ffn": "dense", "flops": x, "seconds": x, "loss": 1 + x**-0.5} for x in (1.0, 4.0, 9.0, 16.0, 25.0)]
    few = [{"ffn": "experts", "flops": x, "seconds": x, "loss": 2.0} for x in (2.0, 3.0)]
    found = list(at_equal_cost(sweep, pd.DataFrame([*known, *few])))
    assert [(row["of"], row["loss"] == "not determined") for row in found] == 2 * [("dense", False), ("experts", True)]
