"""The tutorial's commands on two nodes, word by word."""

import json
import shlex
from typing import TYPE_CHECKING

import pytest
from documentation import TUTORIALS, commands, copy_configs

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(400)]


def test_two_nodes_on_slurm(cluster: "Cluster") -> None:
    copy_configs(cluster.folder)
    dry, submit, *look = commands(TUTORIALS / "two-nodes-on-slurm.md")
    assert "#SBATCH --nodes=2" in cluster.omnivl(*shlex.split(dry)[1:])
    told = cluster.omnivl(*shlex.split(submit)[1:])
    job, run = told.split()[1].rstrip(":"), cluster.folder / "runs" / "tutorial"
    assert job in cluster.omnivl(*shlex.split(look[0])[1:])
    (row,) = json.loads(cluster.omnivl(*shlex.split(look[1])[1:]))
    assert (row["job"], row["run"]) == (job, str(run))
    log = cluster.finish(job, run, limit=300)
    assert "4 ranks" in log and "the run is complete" in log
    assert (run / "report.html").is_file()
