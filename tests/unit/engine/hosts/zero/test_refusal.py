import pytest
import synthetic_chain as synthetic

from engine.errors import PlanError
from engine.hosts.zero.host import ZeroHost
from engine.plan.parallel import Offloading
from engine.step.optimizer import OptimizerConfig


def test_refuses_to_offload_what_is_not_sharded() -> None:
    chain = synthetic.build_synthetic_chain()
    with pytest.raises(PlanError) as error:
        ZeroHost(
            chain,
            OptimizerConfig(),
            synthetic.plan_layout,
            total_steps=1,
            zero_stage=0,
            micro_batch_size=1,
            offload=Offloading(optimizer=True),
        )
    assert str(error.value) == (
        "parallel.offload: got 'optimizer' with zero_stage 0; allowed with 1, 2 and 3; change either"
    )
