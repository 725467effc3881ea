"""Shared prototypes (CODIS): loss and gradients by hand, ambiguities of the paper, replicas, operations."""

from dataclasses import replace

import pytest
import torch
from small_towers import TOKENS

from omnivl.architectures import ALBEF
from omnivl.architectures.build import build_chain
from omnivl.chain.backward import Backward
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.state import State
from omnivl.objectives.prototypes import Prototypes, PrototypesHead
from omnivl.parts.sizes import Transformer

OBJECTIVE = Prototypes(num_prototypes=5, iterations=400, beta=0.2)
WIDE = Transformer(hidden_size=16, num_heads=2, layers=2)
SMALL = ALBEF(
    **{"vision": WIDE, "text": replace(WIDE, norm="post"), "fusion": replace(WIDE, norm="post")},
    **{"image_size": 16, "patch_size": 8, "text_length": 7, "vocab_size": 50, "projection_size": 3},
)
NAMES = ("visual_embedding", "text_embedding")


def head_of(objective: Prototypes) -> PrototypesHead:
    torch.manual_seed(0)
    head = objective.build_head(SMALL.heads)
    assert isinstance(head, PrototypesHead)
    return head


def state_of(count: int = 4) -> State:
    random = torch.Generator().manual_seed(1)
    made = {
        name: torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=-1).requires_grad_()
        for name in (*NAMES, *(f"momentum_{one}" for one in NAMES))
    }
    scale = torch.tensor(5.0, requires_grad=True)
    return State({**made, "logit_scale": scale}, plan_layout((OBJECTIVE,), "image_text", count, 1))


def best_plan(cost: torch.Tensor) -> torch.Tensor:
    """The cheapest plan by linear programming, rows of mass 1 / J, columns of 1 / K."""
    from scipy.optimize import linprog

    rows, columns = cost.shape
    sums = torch.zeros(rows + columns, rows * columns)
    for row in range(rows):
        sums[row, row * columns : (row + 1) * columns] = 1.0
    for column in range(columns):
        sums[rows + column, column::columns] = 1.0
    masses = torch.cat([torch.full((rows,), 1.0 / rows), torch.full((columns,), 1.0 / columns)])
    found = linprog(cost.flatten().double().numpy(), A_eq=sums.numpy(), b_eq=masses.numpy(), bounds=(0, None))
    return torch.from_numpy(found.x).float().view(rows, columns)


@pytest.mark.parametrize("plan", ["own", "cross"])
@pytest.mark.parametrize("cost", ["distance", "similarity"])
def test_loss_and_gradients_by_hand(plan: str, cost: str) -> None:
    objective = replace(OBJECTIVE, plan=plan, cost=cost)
    head, state = head_of(objective), state_of()
    made = objective.loss(state, Heads(head), LocalGather())
    codes = head.prototypes.detach().clone().requires_grad_()
    unit = codes / codes.norm(dim=-1, keepdim=True)
    students = {name: state[name].detach().clone().requires_grad_() for name in NAMES}
    scale = torch.tensor(5.0, requires_grad=True)
    total, plans = torch.zeros(()), {}
    for name in NAMES:
        cosines = state[f"momentum_{name}"].detach() @ unit.t()
        each = 1 - cosines if cost == "distance" else 1 + cosines
        plans[name] = best_plan(each.detach())
        total = total + (plans[name] * each).sum()
    for name, other in zip(NAMES, NAMES[::-1], strict=True):
        target = plans[name if plan == "own" else other] * 4
        for row in range(4):
            logits = scale * students[name][row] @ unit.t()
            total = total - (target[row] * logits.log_softmax(0)).sum() / 4
    torch.testing.assert_close(made.loss, total, rtol=1e-3, atol=1e-3)
    made.loss.backward()
    total.backward()
    torch.testing.assert_close(head.prototypes.grad, codes.grad, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(state["logit_scale"].grad, scale.grad, rtol=1e-2, atol=1e-3)
    for name in NAMES:
        torch.testing.assert_close(state[name].grad, students[name].grad, rtol=1e-2, atol=2e-3)
        assert state[f"momentum_{name}"].grad is None, "the teacher is not taught"
    torch.testing.assert_close(made.metrics["transport"] + made.metrics["prediction"], made.loss.detach())


class Half(LocalGather):
    """One of two replicas, which knows what the other one has."""

    def __init__(self, replica: int, whole: dict[str, torch.Tensor]) -> None:
        self._replica, self._whole = replica, whole

    @property
    def replica(self) -> int:
        return self._replica

    @property
    def replicas(self) -> int:
        return 2

    def join(self, tensor: torch.Tensor) -> torch.Tensor:
        own = slice(2 * self._replica, 2 * self._replica + 2)
        return next(one for one in self._whole.values() if torch.equal(one[own], tensor))


@pytest.mark.parametrize("over", ["joined", "local"])
def test_replicas_move_their_samples_together_if_asked_to(over: str) -> None:
    objective = replace(OBJECTIVE, over=over)
    state, head = state_of(), head_of(objective)
    whole = objective.loss(state, Heads(head), LocalGather()).loss
    whole.backward()
    gradient, embedded = head.prototypes.grad, state["visual_embedding"].grad
    twins = {name: state[f"momentum_{name}"].detach() for name in NAMES}
    other, losses, grads = head_of(objective), [], []
    for replica in range(2):
        own = slice(2 * replica, 2 * replica + 2)
        parts = {name: one.detach()[own].requires_grad_() for name, one in state.items() if name != "logit_scale"}
        half = State({**parts, "logit_scale": torch.tensor(5.0)}, plan_layout((objective,), "image_text", 2, 1))
        losses.append(objective.loss(half, Heads(other), Half(replica, twins)).loss)
        (losses[-1] / 2).backward()
        grads.append(half["visual_embedding"].grad)
    assert gradient is not None and embedded is not None and other.prototypes.grad is not None
    same = torch.allclose(torch.stack(losses).mean(), whole, atol=1e-5)
    assert same == (over == "joined")
    if over == "joined":
        torch.testing.assert_close(other.prototypes.grad, gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(grads), embedded, rtol=1e-4, atol=1e-5)


def test_every_prototype_gets_the_same_mass_and_only_directions_count() -> None:
    head, state = head_of(OBJECTIVE), state_of(20)
    one = OBJECTIVE.loss(state, Heads(head), LocalGather())
    head.prototypes.data.mul_(3.0)
    torch.testing.assert_close(OBJECTIVE.loss(state, Heads(head), LocalGather()).loss, one.loss)
    assert one.metrics["perplexity"] > 4.0, "of five"
    assert list(head.undecayed()) == [head.prototypes]


def test_operations_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    head, state = head_of(OBJECTIVE), state_of()
    with FlopCounterMode(display=False) as counter:
        OBJECTIVE.loss(state, Heads(head), LocalGather()).loss.backward()
    assert counter.get_total_flops() == head.flops(state.layout, Backward())


def test_it_trains_albef_with_its_twins() -> None:
    chain = build_chain(SMALL, (OBJECTIVE,), TOKENS)
    assert chain.losses.heads["prototypes"].prototypes.shape == (5, 3)
    assert plan_layout((OBJECTIVE,), "image_text", 4, 1).twins.keys() == {"visual", "text"}
