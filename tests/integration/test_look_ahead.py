"""A run whose last stage cannot begin does not begin at all."""

import time
from typing import TYPE_CHECKING

import patience
import pytest
from broken_inputs import BROKEN, plan_of, write_files, write_plan

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_bad_third_stage_stops_a_run_before_its_first_step(pretraining: "Pretraining", processes: int) -> None:
    write_files(pretraining.folder)
    content = plan_of(pretraining.folder, launch={"processes": processes})
    content["stages"][0]["steps"] = 100_000
    for name in ("hole in a range", "evaluation's filter", "no such weights"):
        BROKEN[name][0](content["stages"][2], pretraining.folder)
    write_plan(pretraining.folder, content)
    begun = time.monotonic()
    output = pretraining.run("run", code=2)
    seconds = time.monotonic() - begun
    for field in ("data.0.source", "evaluate.tasks.0.where", "weights.all"):
        assert output.count(f": stages.2.{field}: ") == 1, output
    assert "Traceback" not in output
    assert not list(pretraining.folder.glob("run/stages/*")), "nothing was begun"
    assert seconds < patience.seconds(60), "an import of torch on a busy machine, not 100,000 steps"


def test_a_fresh_start_that_is_refused_deletes_nothing(pretraining: "Pretraining") -> None:
    write_files(pretraining.folder)
    content = plan_of(pretraining.folder)
    content["stages"] = content["stages"][:2]
    write_plan(pretraining.folder, content)
    pretraining.run("run", "stages.second.steps=1", limit=200)
    weights = pretraining.stage("run", "01-first") / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    output = pretraining.run("run", "stages.second.data.0.source=gone.tar", "--fresh", code=2)
    assert "stages.1.data.0.source: " in output
    assert weights.stat().st_mtime_ns == before
