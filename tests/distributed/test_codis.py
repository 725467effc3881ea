"""CODIS in every layout: losses, gradient norms and weights, twins and prototypes, agree with those of one process."""

from typing import Any

import pytest
from pairs import Report, check_hosts_agree
from test_albef import CONFIG
from test_layouts import train
from test_tcl import Views

from omnivl.objectives import VLM, IntraModal, Objective, Prototypes, UniVLC

# A plan moves the samples of one micro-batch of all replicas.
OBJECTIVES: tuple[Objective, ...] = (
    UniVLC(queue_size=21, batch_keys="momentum", soft_target_alpha=0.4),
    IntraModal(queue_size=21),
    Prototypes(num_prototypes=6, beta=0.2),
    VLM(negatives="global"),
)


def train_codis(hosts: list[str]) -> Report:
    """Worker: trains each host in turn."""
    return train(Views(CONFIG, OBJECTIVES), hosts)


@pytest.mark.distributed
@pytest.mark.full  # what it has beyond TCL, which runs always, is one loss over the joined batch
@pytest.mark.timeout(400)
def test_hosts_agree(run_distributed: Any) -> None:
    losses = {"univlc", "intra_modal", "prototypes", "vlm"}
    weights = check_hosts_agree(run_distributed, train_codis, losses, limit=350)["weights"]
    assert weights["losses.heads.prototypes.prototypes"].shape[0] == 6
