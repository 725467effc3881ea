"""Counts with a memory, of results and of passes of equal layers, are those without, and take few calls."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.estimate import layers, work
from engine.estimate.results import BlankResults, MetaResults
from engine.estimate.vocabulary import tokenizer_or_size
from engine.estimate.work import model_work
from engine.plan.parse import load_plan
from omnivl.chain.state import State

PLANS = Path(__file__).parents[4] / "configs" / "plans"
META = torch.device("meta")
SLOW = {
    "emoji",
    "fillings",
    "quickstart",
    "regimes",
    "router_losses",
    "tutorial",
    "blip2_tiny",
    "vqa_tiny",
    "x2vlm_tiny",
}
NAMES = sorted(path.stem for path in PLANS.glob("*.yaml") if path.stem.endswith("_tiny") or path.stem in SLOW)


class NothingRemembered(MetaResults):
    """Calls torch every time."""

    def call(self, func, args, kwargs):  # type: ignore[no-untyped-def]
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else []) for name in NAMES]
)
def test_counts_are_the_same_to_the_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture, objective, filling and sort of batch that small plans have; a third of stages recompute."""
    plan = load_plan(PLANS / f"{name}.yaml", ["parallel.precision=bf16"], 2)
    tokenizer = tokenizer_or_size(plan)
    known = MetaResults()
    for number, stage in enumerate(plan.stages):
        batch = replace(stage.batch, micro_batch_size_per_gpu=2)
        mode = ("none", "block", "attention")[number % 3]
        small = replace(stage, batch=batch, model=stage.model.recomputing(mode))  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            patched.setattr(layers, "_RESULTS", NothingRemembered())
            patched.setattr(work, "layer_form", lambda layer: object())  # equal to no other, in either pass
            patched.setattr(work, "state_form", lambda state: object())
            plainly = model_work(small, tokenizer, 3, META)
        monkeypatch.setattr(layers, "_RESULTS", known)
        for _ in range(2):
            assert model_work(small, tokenizer, 3, META) == plainly


class NothingBlank(BlankResults):
    """Calls torch every time."""

    def call(self, func, args, kwargs):  # type: ignore[no-untyped-def]
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("limoe_tiny", "bf16"),
        ("beit3_tiny", "fp32"),
        *(pytest.param(one, "bf16", marks=pytest.mark.full) for one in sorted(SLOW)),
    ],
)
def test_counts_on_a_cpu_are_those_of_real_results(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros in place of products, and passes of equal layers run once, change no operation and no byte."""
    plan = load_plan(PLANS / f"{name}.yaml", [f"parallel.precision={precision}"], 2)
    stage, tokenizer = plan.stages[-1], tokenizer_or_size(plan)
    small = replace(stage, batch=replace(stage.batch, micro_batch_size_per_gpu=4))
    found = []
    for blank in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(layers, "_BLANK", BlankResults(large=2**15) if blank else NothingBlank())
            if not blank:
                patched.setattr(work, "layer_form", lambda layer: object())
            torch.manual_seed(0)
            found.append(model_work(small, tokenizer, 2, torch.device("cpu")))
    assert found[0] == found[1]


def test_costly_operations_of_a_cpu_are_computed_once() -> None:
    results, aten = BlankResults(), torch.ops.aten
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    first, again = (results.call(aten.mm.default, (x, w), {}) for _ in range(2))
    assert first.eq(4).all() and again.eq(0).all()
    assert (again.shape, again.stride(), again.dtype) == (first.shape, first.stride(), first.dtype)
    assert again.untyped_storage().nbytes() == first.untyped_storage().nbytes()
    assert results.call(aten.mm.default, (x.double(), w.double()), {}).eq(4).all()  # another form
    kept = torch.full((3, 5), 7.0)
    assert results.call(aten.mm.out, (x, w), {"out": kept}) is kept
    assert results.call(aten.add.Tensor, (x, 1), {}).eq(2).all()  # not costly
    large = BlankResults(large=12)
    added, blank = (large.call(aten.add.Tensor, (x, 1), {}) for _ in range(2))
    assert added.eq(2).all() and blank.eq(0).all()
    assert large.call(aten.add_.Tensor, (x, 1), {}) is x and x.eq(1).all()
    for _ in range(2):
        assert large.call(aten.view.default, (x, [12]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata
        unsafe = large.call(aten._unsafe_view.default, (x, [12]), {})  # its schema does not say that it is a view
        assert unsafe.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert large.call(aten.gt.Scalar, (x, 0.5), {}).all()  # of no floating point
        assert large.call(aten.where.self, (x > 2, x, x), {}).eq(1).all()
    normed, mean, _ = results.call(aten.native_layer_norm.default, (x, [4], None, None, 1e-5), {})
    assert normed.shape == (3, 4) and mean.shape == (3, 1)


def test_more_blocks_need_no_more_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search costs does not follow the number of blocks: 16 in place of 8 are the same calls."""
    asked = []
    for depth in (8, 16):
        plan = load_plan(PLANS / "beit3_tiny.yaml", [f"model.vision_layers={depth}", "model.drop_path=0"], 2)
        stage, tokenizer = plan.stage("masked"), tokenizer_or_size(plan)
        results = MetaResults()
        monkeypatch.setattr(layers, "_RESULTS", results)
        model_work(stage, tokenizer, 1, META)
        asked.append(len(results))
        model_work(replace(stage, model=stage.model.recomputing("block")), tokenizer, 1, META)
        assert len(results) < 1.05 * asked[-1]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("name", "depth", "more"),
    [
        ("beit3_tiny", "model.vision_layers", ["model.drop_path=0.1"]),
        ("emoji", "model.vision_layers", ["model.drop_path=0.1"]),
        ("vilt_tiny", "model.blocks.layers", []),
    ],
)
def test_equal_blocks_are_run_once(name: str, depth: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times as many blocks, each with a drop path of its own, are no more runs."""
    ran: list[int] = []
    real = work.made_by_layer

    def counted(given: State, after: State) -> list[Tensor]:
        ran[-1] += 1
        return real(given, after)

    monkeypatch.setattr(work, "made_by_layer", counted)
    for count in (8, 24):
        plan = load_plan(PLANS / f"{name}.yaml", [f"{depth}={count}", *more], 2)
        ran.append(0)
        found = model_work(plan.stages[0], tokenizer_or_size(plan), 1, META)
        assert len(found.passes) >= count
    assert 0 < ran[0] == ran[1]


def test_what_is_not_a_function_of_the_form_is_called() -> None:
    results, x = MetaResults(), torch.zeros(3, 4, device=META)
    aten = torch.ops.aten
    for _ in range(2):
        assert results.call(aten.add_.Tensor, (x, 1), {}) is x
        assert results.call(aten.view.default, (x, [12]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata
        assert results.call(aten.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2]
        unsafe = results.call(aten._unsafe_view.default, (x, [12]), {})  # its schema does not say that it is a view
        assert unsafe.untyped_storage()._cdata == x.untyped_storage()._cdata
        whole = torch.zeros(3, dtype=torch.int64, device=META)
        one, two = (results.call(aten.add.Tensor, (whole, added), {}) for added in (1, 1.0))
        assert (one.dtype, two.dtype) == (torch.int64, torch.float32)
        made = results.call(aten.native_layer_norm.default, (x, [4], None, None, 1e-5), {})
        assert [part.shape for part in made] == [(3, 4), (3, 1), (3, 1)]
        turned = results.call(aten.add.Tensor, (x.t(), 1), {})
        assert turned.shape == (4, 3) and turned.stride() == (1, 4)
