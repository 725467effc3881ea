"""X-VLM in every layout: losses on regions, gradient norms and weights agree with those of one plain process."""

from typing import Any

import pytest
from pairs import PairModel, Report, check_hosts_agree
from small_xvlm import CONFIG, OBJECTIVES, collated, examples
from test_layouts import ACCUMULATION, JOINED, train

from omnivl.chain.gather import Gather


class RegionModel(PairModel):
    """Pictures with regions, fewer on some than others."""

    def batches(self, step: int, gather: Gather) -> list[Any]:
        own = JOINED // gather.replicas
        share = slice(gather.replica * own, (gather.replica + 1) * own)
        indices = range(step * ACCUMULATION, (step + 1) * ACCUMULATION)
        return [collated(examples(JOINED, index)[share], self.objectives) for index in indices]


def train_xvlm(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(RegionModel(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    check_hosts_agree(run_distributed, train_xvlm, {"itc", "vlm", "mlm", "locate"}, limit=350)
