"""What uneven routing costs under expert parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from engine.estimate.banks import calls_of_banks, even_loads
from engine.estimate.hardware import load_hardware
from engine.estimate.operations import OperationCounter, Operations, weighted
from engine.estimate.report import estimate_stage, outlined
from engine.estimate.skew import (
    experts_by_layer,
    heard_layers,
    heaviest,
    loads_by_stage,
    part_of_banks,
    read_loads,
)
from engine.estimate.traffic import Cluster
from engine.estimate.work import REORDERED, Pass, model_work
from engine.hosts.zero.experts import expert_banks
from engine.plan.parse import load_plan
from moe.config import LIMoEConfig
from moe.experts.bank import ExpertBank
from moe.sparse import SparseFeedForward
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


def _banks() -> dict[str, ExpertBank]:
    plan = load_plan(PLANS / "emoji.yaml", ["model.vision_layers=2", f"stages.spatial.model.ffn={FEW}"], 1)
    chain = outlined(plan.stage("spatial"), load_tokenizer(plan.tokenizer))
    return {name.partition(".")[0]: bank for name, bank in expert_banks(chain)}


def _bytes(of: Operations) -> float:
    return sum(one.bytes * count for one, count in of.items())


def _all_flops(of: Operations) -> float:
    return sum(one.flops * count for one, count in of.items())


def _flops(of: Operations) -> float:
    return sum(one.flops * count for one, count in of.items() if one.kind == "product" and one.flops > 1e5)


def test_rows_of_the_backward_pass_are_counted() -> None:
    plain, again = _counted()["visual_01"], _counted("model.recompute=block")["visual_01"]
    products = _flops(plain.banks.rows)
    assert products > 0.2 * _flops(plain.forward)
    assert _flops(plain.banks_backward.rows) == pytest.approx(2 * products, rel=0.04)
    assert again.banks == plain.banks
    assert _flops(again.banks_backward.rows) == pytest.approx(3 * products, rel=0.04)
    assert again.routed == plain.routed == plain.routed_gradient
    assert again.routed_gradient == 2 * plain.routed


def test_rows_and_weights_are_told_apart() -> None:
    """Of a bank in bf16: products belong to the rows, and casts to the weights, which all other experts have."""
    bank = _banks()["visual_01"]
    one = _counted()["visual_01"]
    elements = sum(parameter.numel() for parameter in bank.parameters())
    assert _flops(one.banks.weights) == pytest.approx(0.0, abs=1.0)
    # Each weight is read in fp32 and written in bf16, then read by a product.
    assert _bytes(one.banks.weights) == pytest.approx(8 * elements, rel=0.02)
    # Read twice by products that give gradients of rows (one of them of what enters GELU), written once as a gradient,
    # read again and written in fp32.
    assert _bytes(one.banks_backward.weights) == pytest.approx((2 + 2 + 2 + 4) * elements, rel=0.02)
    rows = one.routed / 2 / bank.hidden_size
    assert _flops(one.banks.rows) == pytest.approx(2 * 2 * rows * bank.hidden_size * bank.inner_size, rel=0.01)


def test_counts_of_rows_hold_at_any_number_of_them() -> None:
    """What is counted on few rows, with rows of as many again, is what is counted on twice as many."""
    small, large = (_counted(f"batch.micro_batch_size_per_gpu={size}")["visual_01"] for size in (16, 32))
    doubled = weighted((small.banks.rows, 2.0), (small.banks.weights, 1.0))
    assert _flops(doubled) == pytest.approx(_flops(large.banks.rows), rel=0.01)
    assert _bytes(doubled) == pytest.approx(_bytes(large.banks.rows) + _bytes(large.banks.weights), rel=0.01)


def test_experts_are_even_on_blank_samples() -> None:
    """A CPU's kernels depend on the loads, and those of blank samples say nothing."""
    layer, seen = nn.Module(), []
    layer.ffn = SparseFeedForward(LIMoEConfig(num_experts=4), 8, 16, ["image"])
    bank = layer.ffn.experts
    bank.register_forward_hook(lambda _, given, made: seen.append(given[1].tolist()))
    rows = torch.randn(11, 8)
    with even_loads(layer), calls_of_banks(layer) as calls:
        bank(rows, torch.tensor([10, 0, 0, 0]))
    bank(rows, torch.tensor([10, 0, 0, 0]))
    assert seen == [[3, 3, 2, 2], [10, 0, 0, 0]]
    assert [(one.rows, one.sent, one.carried, one.backward) for one in calls] == [(10, 11 * 8 * 4, False, True)]


def test_the_second_forward_pass_of_a_global_contrast_has_no_backward_pass() -> None:
    batch = "batch.gradient_accumulation_steps=2"
    micro, whole = (_counted(batch, f"batch.contrast={how}")["visual_01"] for how in ("micro", "global"))
    assert _flops(whole.banks.rows) == 2 * _flops(micro.banks.rows)
    assert whole.banks_backward == micro.banks_backward
    assert whole.backward == micro.backward


def test_frozen_experts_have_no_gradient() -> None:
    trained = _counted()["visual_01"]
    frozen = _counted("freeze=[visual_01.block.ffn.experts.*]")["visual_01"]
    assert _flops(frozen.banks.rows) == _flops(trained.banks.rows)
    assert _flops(frozen.banks_backward.rows) == pytest.approx(_flops(trained.banks.rows), rel=0.04)


def test_shared_experts_get_all_tokens_whatever_the_load() -> None:
    alone, beside = (_counted(ffn=one)["visual_01"] for one in (FEW, FEW.replace("}", ", shared_experts: 1}")))
    assert _flops(beside.forward) > _flops(alone.forward)
    assert beside.banks == alone.banks
    assert beside.banks_backward == alone.banks_backward


class Echo:
    """An exchange with a second process that sends what it gets."""

    parts, part = 2, 0

    def trade_counts(self, counts: Tensor) -> Tensor:
        return counts

    def start_rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        return lambda: rows

    def join(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor])


def test_copies_around_the_exchange_of_rows_are_counted() -> None:
    moved = []
    for exchange in (None, Echo()):
        bank = ExpertBank(2 if exchange is None else 4, 64, 8)
        if exchange is not None:
            bank.cut(exchange)
        rows = torch.randn(512, 64, requires_grad=True)
        given = torch.ones(512, 64)
        with OperationCounter() as counter:
            bank(rows, torch.full((bank.num_experts,), 512 // bank.num_experts)).backward(given)
        moved.append(_bytes(counter.found))
    assert moved[1] - moved[0] == pytest.approx(2 * REORDERED * 512 * 64 * 4, rel=0.1)


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
    assert part_of_banks(work, 1, steep) == work
    split, heavy = part_of_banks(work, 4), part_of_banks(work, 4, steep)
    assert part_of_banks(work, 4, flat) == split
    factor = heaviest(steep["unified_03"], 4)
    for whole, even, uneven in zip(work.passes, split.passes, heavy.passes, strict=True):
        if whole.layer not in layers:
            assert uneven == even and even.forward == whole.forward and even.backward == whole.backward
            continue
        # A quarter of the weights, as many operations, as many products.
        assert _bytes(whole.forward) - _bytes(even.forward) == pytest.approx(0.75 * _bytes(whole.banks.weights))
        assert sum(even.forward.values()) == pytest.approx(sum(whole.forward.values()))
        assert _all_flops(even.forward) == pytest.approx(_all_flops(whole.forward))
        more = (factor - 1) * _all_flops(whole.banks.rows) if whole.layer == "unified_03" else 0.0
        assert _all_flops(uneven.forward) - _all_flops(even.forward) == pytest.approx(more)
        assert uneven.routed == pytest.approx(whole.routed * (factor if whole.layer == "unified_03" else 1))
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
