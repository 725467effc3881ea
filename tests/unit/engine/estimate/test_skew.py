"""What uneven routing costs under expert parallelism."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from engine.estimate.hardware import load_hardware
from engine.estimate.report import estimate_stage, outlined
from engine.estimate.skew import experts_by_layer, heaviest, read_loads, skewed
from engine.estimate.traffic import Cluster
from engine.estimate.work import model_work
from engine.plan.parse import load_plan
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError

PLANS = Path(__file__).parents[4] / "configs" / "plans"


def test_the_heaviest_process_by_hand() -> None:
    load = np.array([0.4, 0.1, 0.2, 0.3])
    assert heaviest(load, 1) == pytest.approx(1.0)
    assert heaviest(load, 2) == pytest.approx(1.0)  # 0.5 each
    assert heaviest(load, 4) == pytest.approx(1.6)
    assert heaviest(np.array([0.7, 0.1, 0.1, 0.1]), 2) == pytest.approx(1.6)


def test_loads_are_counted_from_a_table_of_tokens(tmp_path: Path) -> None:
    tokens = pd.DataFrame({"layer": ["unified_01"] * 4 + ["unified_03"] * 2, "expert": [0, 0, 3, 1, 2, 2]})
    tokens.to_parquet(tmp_path / "routing.parquet")
    found = read_loads(tmp_path / "routing.parquet", {"unified_01": 4, "unified_03": 4})
    assert found["unified_01"].tolist() == [0.5, 0.25, 0, 0.25]
    assert found["unified_03"].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("what", ["missing", "text", "columns", "layer", "expert"])
def test_tables_of_other_models_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "routing.parquet"
    layer, expert = ("other_01" if what == "layer" else "unified_01"), (9 if what == "expert" else 1)
    if what == "text":
        path.write_text("no table")
    elif what == "columns":
        pd.DataFrame({"layer": ["unified_01"]}).to_parquet(path)
    elif what != "missing":
        pd.DataFrame({"layer": [layer], "expert": [expert]}).to_parquet(path)
    with pytest.raises(UserError, match=r"--routing: got .*routing.parquet.*; allowed .*; name"):
        read_loads(path, {"unified_01": 4})


def test_only_products_of_experts_and_their_rows_grow() -> None:
    plan = load_plan(PLANS / "limoe_tiny.yaml", ["parallel.host=zero"], 4)
    stage, tokenizer = plan.stages[0], load_tokenizer(plan.tokenizer)
    cluster = Cluster(load_hardware("h100"), 1, 4)
    chain = outlined(stage, tokenizer)
    layers = experts_by_layer(chain)
    assert layers == {"unified_01": 8, "unified_03": 8, "unified_05": 8}
    work = model_work(stage, tokenizer, 4, torch.device("meta"))
    flat = {name: np.full(8, 1 / 8) for name in layers}
    steep = flat | {"unified_03": np.array([0.5, *[0.5 / 7] * 7])}
    assert skewed(work, flat, 4) == work
    assert skewed(work, steep, 1) == work
    heavy = skewed(work, steep, 4)
    factor = heaviest(steep["unified_03"], 4)
    for before, after in zip(work.passes, heavy.passes, strict=True):
        if before.layer != "unified_03" or not before.experts:
            assert after == before
            continue
        assert after.routed == pytest.approx(factor * before.routed)
        flops = [sum(one.flops * count for one, count in of.items()) for of in (before.experts, before.forward)]
        assert 0.2 * flops[1] < flops[0] < flops[1]
        grown = sum(one.flops * count for one, count in after.forward.items())
        assert grown == pytest.approx(flops[1] + (factor - 1) * flops[0])
    even, uneven = (
        estimate_stage(stage, tokenizer, cluster, work=work, chain=chain, loads=loads) for loads in (None, steep)
    )
    assert even.expert_parallel == 4
    assert even.step.seconds < uneven.step.seconds < factor * even.step.seconds
    alone = replace(stage, parallel=replace(stage.parallel, expert_parallel_size=1))
    one, other = (
        estimate_stage(alone, tokenizer, cluster, work=work, chain=chain, loads=loads) for loads in (None, steep)
    )
    assert one.step.seconds == other.step.seconds
