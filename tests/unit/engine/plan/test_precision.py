"""What a plan's ``precision: auto`` becomes."""

from pathlib import Path

import pytest
import torch

from engine.plan import precision
from engine.plan.parallel import ParallelConfig
from engine.plan.parse import load_plan
from engine.plan.precision import compute_dtype, faster_precision, with_precision

PLAN = Path(__file__).parents[4] / "configs" / "plans" / "quickstart.yaml"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rates", "chosen"), [({"bf16": 5.0, "fp32": 1.0}, "bf16"), ({"bf16": 1.0, "fp32": 5.0}, "fp32")]
)
def test_auto_is_what_the_machine_multiplies_faster(
    rates: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    monkeypatch.setattr(precision, "measured_peak", lambda device, dtype, seconds: rates[names[dtype]])
    assert faster_precision(CPU) == chosen
    assert names[compute_dtype(ParallelConfig(precision="auto"), CPU)] == chosen
    assert compute_dtype(ParallelConfig(precision="bf16"), CPU) == torch.bfloat16
    assert compute_dtype(ParallelConfig(precision="fp32"), CPU) == torch.float32


def test_every_auto_of_a_plan_is_replaced_and_nothing_else() -> None:
    plan = load_plan(PLAN, ["parallel.precision=auto", "stages.joint.parallel.precision=fp32"])
    settled = with_precision(plan, "bf16", {"temporal": "fp32"})
    assert [stage.parallel.precision for stage in settled.stages] == ["bf16", "fp32", "fp32"]
    assert settled.parallel.precision == "bf16"
    assert with_precision(settled, "fp32") == settled
