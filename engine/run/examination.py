"""Runs evaluation tasks on the present chain of a stage. Where that fails it is recorded, and costs the run no step."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine.disk.evaluation import write_failed
from engine.hosts.base import Host
from engine.plan.plan import StagePlan
from engine.processes import ranks
from engine.processes.collectives import make_gather
from engine.processes.seeds import generator_states, restore_generators
from engine.watch.failure import describe_error
from omnivl.chain.gather import ReplicaError
from omnivl.data.config import Decoder
from omnivl.data.gpu_decode import gpu_for_decoding
from omnivl.data.tokenizer import Tokenizer, load_readers
from omnivl.inference.encoder import Encoder
from omnivl.tasks import TaskConfig
from omnivl.tasks.results import TaskResult
from omnivl.tasks.run import run_tasks

Result = TypeVar("Result")

_PATIENCE_SECONDS = 60.0
"""How long a process whose evaluation failed waits for the others, before it ends the run."""


class UnevaluatedError(Exception):
    """An evaluation within a stage failed. Raised on every process.

    The stage is then built anew and resumes: a chain whose forward pass was interrupted may hold gathered weights that
    no longer change.
    """


def examine(
    host: Host, stage: StagePlan, tokenizer: Tokenizer, tasks: Sequence[TaskConfig], decode: Decoder
) -> list[TaskResult]:
    """Runs tasks on the present chain, each process its share; equal on all of them.

    Training's random generators are afterwards as they were before, whatever a task draws from them.

    Args:
        host: Holds the chain.
        stage: The chain's.
        tokenizer: Turns texts into ids.
        tasks: What is run.
        decode: What decodes JPEGs and videos (``LoaderConfig.decode``).

    Raises:
        DataError: A GPU cannot decode here, or a sample is bad.
    """
    readers = load_readers(stage.model.text_inputs, tokenizer)
    drawn = generator_states()
    try:
        with host.whole_chain() as chain:
            encoder = Encoder(
                chain,
                stage.model,
                tokenizer,
                make_gather(),
                host.device,
                readers=readers,
                decodes_on=gpu_for_decoding("spawn", num_workers=0) if decode == "gpu" else None,
            )
            return run_tasks(tasks, encoder)
    finally:
        restore_generators(drawn)


def attempt(action: Callable[[], Result], key: str, step: int, failures: Path) -> Result:
    """Does what evaluates, and records where that fails, so that no later start repeats it. Called by every process.

    Args:
        action: Has collectives in it.
        key: The same on every process, and new in this run.
        step: Optimizer steps taken.
        failures: The file of failures (``engine.disk.evaluation``).

    Returns:
        What the action returns on this process.

    Raises:
        UnevaluatedError: It failed on some process.
    """
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(action())
    except Exception as caught:  # whatever it is, the steps are not lost
        error = caught
    # another process has the cause of a ReplicaError
    problem = None if error is None or isinstance(error, ReplicaError) else describe_error(error)
    try:
        problem = ranks.first_problem(key, problem, _PATIENCE_SECONDS)
    except (TimeoutError, ConnectionError) as lost:
        if error is None:
            raise
        if isinstance(lost, TimeoutError):  # else another process has ended, and this one's error came from that
            write_failed(failures, step, f"process {ranks.rank()}: {problem}")
        raise error from lost
    if problem is None:
        return result[0]
    ranks.on_first(lambda: write_failed(failures, step, problem))
    raise UnevaluatedError(f"step {step}: the evaluation failed: {problem}") from error
