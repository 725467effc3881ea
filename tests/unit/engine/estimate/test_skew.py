"""What uneven routing costs under expert parallelism."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from engine.estimate.hardware import load_hardware
from engine.estimate.operations import Operations
from engine.estimate.report import estimate_stage, outlined
from engine.estimate.skew import (
    _heavier,
    experts_by_layer,
    heard_layers,
    heaviest,
    loads_by_stage,
    read_loads,
    skewed,
)
from engine.estimate.traffic import Cluster
from engine.estimate.work import Pass, model_work
from engine.plan.parse import load_plan
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError

PLANS = Path(__file__).parents[4] / "configs" / "plans"
FEW = "{kind: limoe, num_experts: 4, top_k: 1, every: 2, implementation: grouped}"


def test_the_heaviest_process_by_hand() -> None:
    load = np.array([0.4, 0.1, 0.2, 0.3])
    assert heaviest(load, 1) == pytest.approx(1.0)
    assert heaviest(load, 2) == pytest.approx(1.0)  # 0.5 each
    assert heaviest(load, 4) == pytest.approx(1.6)
    assert heaviest(np.array([0.7, 0.1, 0.1, 0.1]), 2) == pytest.approx(1.6)


def test_loads_are_counted_from_a_table_of_tokens(tmp_path: Path) -> None:
    path = _table(tmp_path, ["unified_01"] * 4 + ["unified_03"] * 2, [0, 0, 3, 1, 2, 2])
    found = read_loads(path, {"unified_01": 4, "unified_03": 4}, ["unified_03"])
    assert found["unified_01"].tolist() == [0.5, 0.25, 0, 0.25]
    assert found["unified_03"].tolist() == [0, 0, 1, 0]


def test_choices_that_no_expert_served_are_no_load(tmp_path: Path) -> None:
    """A capacity of two rows: the bank gets no more, however many tokens choose the expert."""
    path = _table(tmp_path, ["unified_01"] * 6, [0, 0, 0, 0, 1, 1], [True, True, False, False, True, True])
    assert read_loads(path, {"unified_01": 2})["unified_01"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("layers", "experts", "served", "said"),
    [
        (["other_01"], [1], [True], "expert 1 of layer 'other_01'"),
        (["unified_01"], [9], [True], "expert 9 of layer 'unified_01'"),
        (["unified_01"], ["one"], [True], "column `expert`.* not integers"),
        (["unified_01"], [np.inf], [True], "column `expert`.* float64, not integers"),
        (["unified_01"], [1], ["yes"], "column `served`.* not true or false"),
        (["unified_01"], [1], [False], "without a choice that an expert served"),
        (["unified_03"], [1], [True], "without choices of unified_01"),
        (["unified_01"], [1], None, "cannot be read"),
    ],
)
def test_tables_of_other_models_are_refused(
    tmp_path: Path, layers: list[str], experts: list[object], served: list[object] | None, said: str
) -> None:
    path = _table(tmp_path, layers, experts, served or [True])
    if served is None:
        pd.DataFrame({"layer": layers}).to_parquet(path)
    with pytest.raises(UserError, match=rf"--routing: got .*routing.parquet.*{said}.*; allowed .*; name"):
        read_loads(path, {"unified_01": 4, "unified_03": 4}, ["unified_01"])


def test_empty_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = _table(tmp_path, ["unified_01"], [1])
    pd.read_parquet(path).iloc[:0].to_parquet(path)
    with pytest.raises(UserError, match="without a choice that an expert served"):
        read_loads(path, {"unified_01": 4})
    path.write_text("no table")
    for one in (path, tmp_path / "missing.parquet"):
        with pytest.raises(UserError, match=r"--routing: got .*parquet, which cannot be read.*; allowed .*; name one"):
            read_loads(one, {"unified_01": 4})


def test_stages_without_experts_have_no_loads(tmp_path: Path) -> None:
    plan = load_plan(PLANS / "limoe_tiny.yaml", [], 1)
    stage, tokenizer = plan.stages[0], load_tokenizer(plan.tokenizer)
    dense = load_plan(PLANS / "limoe_tiny.yaml", ["model.ffn={kind: dense}"], 1).stages[0]
    chains = {"sparse": outlined(stage, tokenizer), "dense": outlined(dense, tokenizer)}
    routed = ["unified_01", "unified_03", "unified_05"]
    path = _table(tmp_path, routed, [0, 1, 2])
    found = loads_by_stage(path, chains)
    assert list(found) == ["sparse"] and list(found["sparse"]) == routed
    with pytest.raises(UserError, match=r"--routing: got .* without choices of unified_05; .*--stage"):
        loads_by_stage(_table(tmp_path, routed[:2], [0, 1]), chains)
    with pytest.raises(UserError, match=r"--routing: got .* without sparse experts \(dense\)"):
        loads_by_stage(path, {"dense": chains["dense"]})


def test_decoders_may_be_missing(tmp_path: Path) -> None:
    """The task ``routing`` hears encoders alone."""
    plan = load_plan(PLANS / "emoji.yaml", [f"stages.joint.model.ffn={FEW}"], 1)
    chain = outlined(plan.stage("joint"), load_tokenizer(plan.tokenizer))
    experts, heard = experts_by_layer(chain), heard_layers(chain)
    assert {name.partition("_")[0] for name in experts.keys() - heard} == {"alignment", "generation"}
    assert list(loads_by_stage(_table(tmp_path, sorted(heard), [0] * len(heard)), {"joint": chain})["joint"]) == sorted(
        heard
    )


def _table(folder: Path, layers: Sequence[str], experts: Sequence[object], served: Sequence[object] = ()) -> Path:
    table = pd.DataFrame({"layer": layers, "expert": experts, "served": served or [True] * len(layers)})
    table["layer"] = table["layer"].astype("category")
    table.to_parquet(folder / "routing.parquet")
    return folder / "routing.parquet"


def _counted(*overrides: str, ffn: str = "") -> dict[str, Pass]:
    given = [f"stages.spatial.model.ffn={ffn or FEW}", *(f"stages.spatial.{one}" for one in overrides)]
    plan = load_plan(PLANS / "emoji.yaml", ["model.vision_layers=2", "model.text_layers=2", *given], 1)
    work = model_work(plan.stage("spatial"), load_tokenizer(plan.tokenizer), 1, torch.device("meta"))
    return {one.layer: one for one in work.passes}


def _flops(of: Operations) -> float:
    return sum(one.flops * count for one, count in of.items() if one.kind == "product" and one.flops > 1e5)


def test_experts_of_the_backward_pass_are_counted() -> None:
    plain, again = _counted()["visual_01"], _counted("model.recompute=block")["visual_01"]
    assert _flops(plain.experts_backward) == pytest.approx(2 * _flops(plain.experts), rel=0.04)
    assert _flops(again.experts) == _flops(plain.experts)
    assert _flops(again.experts_backward) == pytest.approx(3 * _flops(plain.experts), rel=0.04)
    assert again.routed == plain.routed == plain.routed_gradient
    assert again.routed_gradient == 2 * plain.routed
    heavy, other = _heavier(plain, 0.5), _heavier(again, 0.5)
    assert _flops(heavy.backward) - _flops(plain.backward) == pytest.approx(_flops(plain.experts), rel=0.04)
    assert _flops(other.backward) - _flops(again.backward) == pytest.approx(1.5 * _flops(plain.experts), rel=0.04)


def test_the_second_forward_pass_of_a_global_contrast_has_no_backward_pass() -> None:
    batch = "batch.gradient_accumulation_steps=2"
    micro, whole = (_counted(batch, f"batch.contrast={how}")["visual_01"] for how in ("micro", "global"))
    assert _flops(whole.experts) == 2 * _flops(micro.experts)
    assert whole.experts_backward == micro.experts_backward
    assert whole.backward == micro.backward


def test_frozen_experts_have_no_gradient() -> None:
    trained = _counted()["visual_01"]
    frozen = _counted("freeze=[visual_01.block.ffn.experts.*]")["visual_01"]
    assert _flops(frozen.experts) == _flops(trained.experts)
    assert _flops(frozen.experts_backward) == pytest.approx(_flops(trained.experts), rel=0.04)


def test_shared_experts_get_all_tokens_whatever_the_load() -> None:
    alone, beside = (_counted(ffn=one)["visual_01"] for one in (FEW, FEW.replace("}", ", shared_experts: 1}")))
    assert _flops(beside.forward) > _flops(alone.forward)
    assert beside.experts == alone.experts
    assert beside.experts_backward == alone.experts_backward


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
