"""TCL in every layout: losses, gradient norms and weights, twins and queues, agree with those of one plain process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pairs import PairModel, Report, check_hosts_agree
from test_albef import CONFIG
from test_layouts import train

from omnivl.chain.gather import Gather
from omnivl.objectives import VLM, IntraModal, LocalMI, Objective, UniVLC

OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=21, batch_keys="momentum", soft_target_alpha=0.4),
    IntraModal(queue_size=21, weight=0.5),
    LocalMI(pool=2, negatives="global"),
    VLM(negatives="global"),
)


class Views(PairModel):
    """Batches with a second view of each picture."""

    def batches(self, step: int, gather: Gather) -> list[Any]:
        return [replace(batch, second_view=255 - batch.frames.flip(-1)) for batch in super().batches(step, gather)]


def train_tcl(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Views(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    losses = {"univlc", "intra_modal", "local_mi", "vlm"}
    weights = check_hosts_agree(run_distributed, train_tcl, losses, limit=350)["weights"]
    queues = [f"losses.heads.{key}.queue.visual" for key in ("univlc", "intra_modal")]
    assert torch.equal(*(weights[name] for name in queues)), "both have the momentum keys of the second view"
