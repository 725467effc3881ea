"""Contrast over several replicas, keys joined and in a ring, against one process that holds the joined batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.processes.collectives import make_gather
from omnivl.chain.gather import Gather, LocalGather
from omnivl.objectives.contrast import (
    Teacher,
    nearest_is_positive,
    pair_contrast,
    sigmoid_contrast,
    softmax_contrast,
)
from omnivl.objectives.spread_keys import OldKeys, SpreadKeys

pytestmark = pytest.mark.distributed

OWN = 5


def problem(replicas: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=random), dim=-1)

    count = OWN * replicas
    return {
        "query": unit(count, 6),
        "keys": unit(count, 6),
        "several": unit(count, 3, 6),
        "teacher": unit(count, 6),
        "identity": torch.randint(0, 6, (count,), generator=random),
        "old": unit(7, 6),
        "old_identity": torch.randint(0, 6, (7,), generator=random),
    }


def values(given: dict[str, Tensor], gather: Gather, ring: bool | None) -> dict[str, Tensor]:
    """Losses, figures and gradients of this replica's rows, of all losses."""
    made: dict[str, Tensor] = {}
    first = gather.replica * OWN
    rows = slice(first, first + OWN) if gather.replicas > 1 else slice(None)
    identity = given["identity"][rows]
    older = OldKeys(given["old"], given["old_identity"], torch.arange(7) != 2, torch.linspace(-1, 1, 7))
    teacher = Teacher(given["teacher"][rows], torch.tensor(0.4))

    def record(name: str, run: Callable[[Tensor, Tensor, Tensor, Tensor], Any], keys: str = "keys") -> None:
        leaves = [given["query"][rows].clone(), given[keys][rows].clone(), torch.tensor(5.0), torch.tensor(-2.0)]
        query, own, scale, bias = (leaf.requires_grad_(True) for leaf in leaves)
        loss, *figures = run(query, own, scale, bias)
        # As hosts do: the mean over this replica's queries, gradients averaged over the replicas.
        gradients = torch.autograd.grad(loss.mean(), [query, own, scale, bias], allow_unused=True)
        made[f"{name}/loss"] = gather.join(loss.detach())
        made[f"{name}/query"] = gather.join(gradients[0]) / gather.replicas
        made[f"{name}/keys"] = gather.join(gradients[1]) / gather.replicas
        made[f"{name}/scale"] = gather.total(gradients[2]) / gather.replicas
        if gradients[3] is not None:
            made[f"{name}/bias"] = gather.total(gradients[3]) / gather.replicas
        for number, figure in enumerate(figures):
            made[f"{name}/{number}"] = gather.join(figure)

    def spread(keys: Tensor) -> SpreadKeys:
        return SpreadKeys(keys, identity, gather, ring)

    def both(name: str, keys: str = "keys", **options: Any) -> None:
        """Each direction alone, so that neither hides what is wrong with the other."""
        for side in range(2):
            record(
                f"{name} {side}",
                lambda query, own, scale, _, side=side: pair_contrast(spread(query), spread(own), scale, **options)[
                    side
                ],
                keys,
            )

    record("plain", lambda query, own, scale, _: softmax_contrast(query, identity, spread(own), scale))
    record("several", lambda query, own, scale, _: softmax_contrast(query, identity, spread(own), scale), "several")
    record(
        "all",
        lambda query, own, scale, _: softmax_contrast(
            *(query, identity, spread(own), scale), reduction="sum", log_weight=-0.5, old=older, teacher=teacher
        ),
    )
    both("both")
    both("several of both", "several")
    both("weighted", log_weight=-0.5, old=(older, older), reduction="sum")
    both("pairs", pairs_only=True, label_smoothing=0.1)

    def sigmoid(query: Tensor, own: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        loss, nearest = sigmoid_contrast(spread(query), spread(own), scale, bias)
        return loss, *nearest

    record("sigmoid", sigmoid)
    nearest = nearest_is_positive(spread(given["query"][rows]), spread(given["keys"][rows]))
    made["nearest"] = torch.stack([gather.join(side) for side in nearest])
    return made


def spread(ring: bool) -> dict[str, Tensor]:
    """Worker."""
    gather = make_gather()
    return values(problem(gather.replicas), gather, ring)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("ring", [False, True], ids=["joined", "ring"])
def test_replicas_together_are_one_process(run_distributed: Any, processes: int, ring: bool) -> None:
    whole = values(problem(processes), LocalGather(), None)
    for replica in run_distributed(spread, processes=processes, ring=ring):
        assert replica.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(replica[name], value, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
