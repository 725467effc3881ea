from engine.collectives import make_gather
from omnivl.model.gather import LocalGather


def test_a_lone_process_needs_no_group() -> None:
    assert isinstance(make_gather(), LocalGather)
