"""How a run is laid over processes."""

import pytest

from engine.plan.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("config", "banks", "local", "processes", "cut"),
    [
        (ParallelConfig(expert_parallel_size="auto"), (8,), 2, 2, 2),
        (ParallelConfig(expert_parallel_size="auto"), (8,), 1, 4, 1),
        (ParallelConfig(expert_parallel_size="auto"), (6,), 4, 4, 2),  # four processes cannot share six experts evenly
        (ParallelConfig(expert_parallel_size="auto"), (8, 12), 8, 8, 4),  # banks of two sizes
        (ParallelConfig(expert_parallel_size="auto"), (64,), 8, 16, 8),
        (ParallelConfig(expert_parallel_size="auto"), (), 4, 4, 1),
        (ParallelConfig(expert_parallel_size=4), (8,), 2, 4, 4),  # over two machines
        (ParallelConfig(host="plain", expert_parallel_size="auto"), (8,), 2, 2, 1),
        (
            ParallelConfig(host="pipeline", pipeline_stages=2, expert_parallel_size="auto"),
            (8,),
            4,
            4,
            2,
        ),  # of each stage
        (ParallelConfig(host="pipeline", pipeline_stages=4, expert_parallel_size="auto"), (8,), 4, 4, 1),
    ],
)
def test_processes_over_which_experts_are_cut(
    config: ParallelConfig, banks: tuple[int, ...], local: int, processes: int, cut: int
) -> None:
    assert config.experts_over(banks, local, processes) == cut
