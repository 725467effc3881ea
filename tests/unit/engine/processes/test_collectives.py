from engine.processes.collectives import make_gather
from omnivl.chain.gather import LocalGather


def test_a_lone_process_needs_no_group() -> None:
    assert isinstance(make_gather(), LocalGather)
