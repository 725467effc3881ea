"""Copies of parameters that a layer makes together: values and gradients of single casts, by fewer operations."""

import copy
import pickle
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe.linear import Linear
from moe.working import (
    WorkingCopies,
    gather_on_use,
    made_ready,
    with_working_copies,
    working,
    working_copies,
)

BF16 = torch.bfloat16


class Counted(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Two(nn.Module):
    """Two maps, one of them frozen, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = Linear(5, 7), Linear(7, 3)
        self.scale = nn.Parameter(torch.full((3,), 0.3))
        for parameter in self.other.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.other(self.one(x)) * working(self.scale, x.dtype)
        return made


def passed(model: Two, x: Tensor, copies: WorkingCopies | None) -> tuple[Tensor, list[Tensor | None], Counter[str]]:
    """Output, gradients and operations of a forward and a backward pass."""
    model.zero_grad()
    with Counted() as counted:
        if copies is None:
            out = model(x)
        else:
            with working_copies(copies):
                out = model(x)
        out.float().square().sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()], counted.found


def test_later_passes_copy_all_at_once_and_nothing_else_changes() -> None:
    model, x, copies = Two(), torch.randn(4, 5).to(BF16), WorkingCopies()
    plain = passed(model, x, None)
    first, second = (passed(model, x, copies) for _ in range(2))
    for out, gradients, _ in (first, second):
        assert torch.equal(out, plain[0])
        for got, wanted in zip(gradients, plain[1], strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or (got.dtype == torch.float32 and torch.equal(got, wanted))
    assert [gradient is None for gradient in second[1]] == [False, False, False, True, True]
    assert second[2]["_foreach_copy_"] == 2  # there and back
    own = 1  # of the loss
    assert second[2]["_to_copy"] == 2 * own
    assert plain[2]["_to_copy"] > 2 * own + 6


def test_copies_of_several_layers_are_made_by_one_operation() -> None:
    models, x = [Two(), Two()], torch.randn(4, 5).to(BF16)
    copies = [WorkingCopies(), WorkingCopies()]
    wanted = [passed(model, x, own)[:2] for model, own in zip(models, copies, strict=True)]
    with Counted() as counted, made_ready(copies):
        made = [passed(model, x, own)[:2] for model, own in zip(models, copies, strict=True)]
        # A second pass of a layer reads the same copies.
        again = passed(models[0], x, copies[0])[:2]
    assert counted.found["_foreach_copy_"] == 1 + 3
    for (out, gradients), (hoped, slopes) in zip([*made, again], [*wanted, wanted[0]], strict=True):
        assert torch.equal(out, hoped)
        for got, slope in zip(gradients, slopes, strict=True):
            assert got is None or torch.equal(got, slope)
    assert not any(own.ready for own in copies)


def test_copies_are_those_of_the_moment() -> None:
    """After weights have changed the next pass reads the new ones."""
    model, x, copies = Two(), torch.ones(1, 5, dtype=BF16), WorkingCopies()
    before = [passed(model, x, copies)[0] for _ in range(2)][1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    after = passed(model, x, copies)[0]
    assert torch.equal(after, passed(model, x, None)[0])
    assert not torch.equal(after, before)
    assert working(model.scale, BF16) is not working(model.scale, BF16)  # outside a pass each use casts


def test_a_part_without_a_graph_does_not_take_the_gradient_from_others() -> None:
    scale, copies = nn.Parameter(torch.ones(3)), WorkingCopies()
    for _ in range(2):
        scale.grad = None
        with working_copies(copies):
            with torch.no_grad():
                working(scale, BF16)
            working(scale, BF16).sum().backward()
        assert scale.grad is not None
        assert scale.grad.tolist() == [1.0] * 3


def test_slices_and_parameters_that_are_gathered_on_use_are_cast_by_themselves() -> None:
    table, gathered, copies = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2)), WorkingCopies()
    gather_on_use(gathered)
    with working_copies(copies):
        working(table[1:], BF16)
        working(gathered, BF16)
        assert working(table, torch.float32) is table
    assert not copies.asked


def test_a_recomputed_part_reads_the_copies_of_its_pass() -> None:
    scale, copies = nn.Parameter(torch.ones(3)), WorkingCopies()
    with working_copies(copies):
        held = working(scale, BF16)
        later = with_working_copies(lambda: working(scale, BF16))
    assert later() is held
    assert with_working_copies(later) is later  # nothing to hold outside a pass


def test_threads_do_not_see_each_other() -> None:
    scale, copies, seen = nn.Parameter(torch.ones(3)), WorkingCopies(), []
    with working_copies(copies):
        thread = threading.Thread(target=lambda: seen.append(working(scale, BF16)))
        thread.start()
        thread.join()
        assert working(scale, BF16) is not seen[0]


def test_a_copied_layer_begins_anew() -> None:
    model, copies = Two(), WorkingCopies()
    passed(model, torch.ones(1, 5, dtype=BF16), copies)
    assert len(copies.asked) == 5
    assert not copy.deepcopy(copies).asked
    assert not pickle.loads(pickle.dumps(copies)).asked


@pytest.mark.parametrize("count", [1, 3])
def test_copies_begin_where_products_want_their_matrices(count: int) -> None:
    parameters = [nn.Parameter(torch.ones(3, 5)) for _ in range(count)]
    copies = WorkingCopies()
    for _ in range(2):
        with working_copies(copies):
            made = [working(one, BF16) for one in parameters]
    assert all((one.data_ptr() - made[0].data_ptr()) % 128 == 0 for one in made)


def test_a_layer_that_is_recomputed_makes_its_copies_anew() -> None:
    """Nothing but the parameters is kept until then, and the gradients are those of one pass."""
    model, x, copies = Two(), torch.randn(4, 5).to(BF16), WorkingCopies()
    wanted = passed(model, x, copies)[1]
    model.zero_grad()
    with working_copies(copies):
        out = checkpoint(with_working_copies(model, anew=True), x, use_reentrant=False)
        kept = weakref.ref(working(model.one.weight, BF16))
    assert kept() is None
    out.float().square().sum().backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_a_parameter_that_a_pass_does_not_use_gets_zeros() -> None:
    """Its hooks run anyway, and those of hosts read the gradient."""
    used, unused, copies, seen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), WorkingCopies(), []
    for parameter in (used, unused):
        parameter.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.tolist()))
    with working_copies(copies):
        (working(used, BF16).sum() + working(unused, BF16).sum()).backward()
    seen.clear()
    used.grad = unused.grad = None
    with working_copies(copies):
        working(used, BF16).sum().backward()
    assert sorted(map(str, seen)) == ["[1.0, 1.0, 1.0]", "[[0.0, 0.0], [0.0, 0.0]]"]
