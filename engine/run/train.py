"""A whole run, top to bottom: every stage of a plan, one after the other.

For each stage: build the chain, transfer earlier weights, freeze, create the host, loop, write the result.
"""

import functools
import gc
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.disk.evaluation import read_failed, read_scores
from engine.disk.rollback import RolledBackError
from engine.disk.run_folder import RunFolder, StageFolder, write_whole
from engine.disk.weights_file import written_hash
from engine.disk.weights_out import write_weights
from engine.hosts import Host, replica_group
from engine.plan.batches import batch_in_words
from engine.plan.plan import Plan, StagePlan
from engine.plan.precision import compute_dtype
from engine.processes import ranks
from engine.processes.collectives import make_gather
from engine.processes.files import read_json
from engine.processes.seeds import seed_everything
from engine.report import health_table, last_health, score_table, training_records, write_report
from engine.run.earlier import is_done
from engine.run.entrance import RunOptions, enter
from engine.run.examination import UnevaluatedError
from engine.run.resumption import find
from engine.run.stage import StageLoop
from engine.run.stage_start import source_weights, start_chain, start_host
from engine.run.teachers import give_teachers
from engine.step.determinism import deterministic_operations
from engine.step.freeze import freeze, freeze_idle, store_frozen
from engine.telemetry.peak import Peak, peak_of
from engine.telemetry.progress import Progress, make_progress
from engine.telemetry.throughput import Throughput
from engine.watch.heartbeat import Heartbeat
from engine.watch.stop import StopRequest
from engine.watch.watchdog import watched
from omnivl.data.tokenizer import Tokenizer, load_tokenizer


def train(plan: Plan, options: RunOptions, device: torch.device) -> int:
    """Runs a plan. Called by every process of the run, after the process group is joined.

    Args:
        plan: Without mistakes.
        options: The run's folder, and which stages to run.
        device: Where this process computes.

    Returns:
        0, or the number of the signal that ended the run early; the next start resumes it.

    Raises:
        UserError: The folder is in use or holds another run, or data or weights do not fit.
    """
    run, stop = RunFolder(options.folder), StopRequest()
    stop.install()
    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.lock()))
        plan, notes = enter(run, plan, options, device)
        heartbeat = stack.enter_context(watched(run.heartbeats, run.hangs, plan.guard.hang_seconds))
        steps = {stage.name: stage.steps for stage in plan.stages}
        progress = stack.enter_context(make_progress(steps, every=plan.logging.every, visible=ranks.rank() == 0))
        for note in notes:
            progress.message(note)
        start = _Start(plan, run, load_tokenizer(plan.tokenizer), device, progress, stop, heartbeat)
        for index, stage in enumerate(plan.stages):
            if options.start.stage not in (None, stage.name):
                continue
            if ranks.on_first(functools.partial(is_done, run.stage(index, stage.name), stage), bool):
                progress.message(f"stage {stage.name}: complete")
                continue
            heartbeat.begin("starting", stage.name, 0)
            signal = _run_stage(start, index)
            if signal:
                progress.message("stopped after a checkpoint; the same command goes on from there")
                return signal
        heartbeat.begin("finishing", "", 0)
        ranks.on_first(lambda: _show_result(run, plan, progress))
    return 0


@dataclass(frozen=True)
class _Start:
    """What all stages of one start of a run share."""

    plan: Plan
    run: RunFolder
    tokenizer: Tokenizer
    device: torch.device
    progress: Progress
    stop: StopRequest
    heartbeat: Heartbeat


def _run_stage(start: _Start, index: int) -> int:
    """Runs one stage to its end; returns the number of the signal that ended it early, or 0."""
    while True:
        try:
            return _go_on(start, index)
        except (RolledBackError, UnevaluatedError) as back:
            start.progress.message(str(back))
        start.heartbeat.begin("starting", start.plan.stages[index].name, 0)
        gc.collect()


def _go_on(start: _Start, index: int) -> int:
    """Builds a stage and runs it from its newest checkpoint on.

    Raises:
        RolledBackError: The stage goes back to an earlier checkpoint, for which it has to be built anew.
        UnevaluatedError: An evaluation failed: it has to be built anew as well.
    """
    plan, run, tokenizer, device, progress = start.plan, start.run, start.tokenizer, start.device, start.progress
    stage = plan.stages[index]
    folder = run.stage(index, stage.name)
    gather = make_gather(replica_group(stage.parallel))
    if stage.batch.global_batch_size is not None:
        micro, accumulation = stage.batch.micro_batch_size_per_gpu, stage.batch.gradient_accumulation_steps
        progress.message(f"stage {stage.name}: batch {batch_in_words(micro, accumulation, gather.replicas)}")
    dtype = compute_dtype(stage.parallel, device)
    found = find(folder, progress.message)
    resumes = found.checkpoint is not None
    chain, origins = start_chain(plan, index, run, tokenizer, gather, device, progress, resumes=resumes)
    freeze(chain, stage.freeze, f"stages.{index}.freeze")
    if idle := freeze_idle(chain, stage.layouts()):
        parts = ", ".join(f"{count / 1e6:.2f} M of {stack}" for stack, count in idle.items())
        progress.message(f"stage {stage.name}: frozen, as no objective gives them a gradient: {parts} (parameters)")
    store_frozen(chain, stage.model.stacks)
    host = start_host(chain, stage, device, origins)
    if host.computes_losses:
        for line in give_teachers(chain, plan, index, run, tokenizer, device, dtype):
            progress.message(line)
    chain.train()
    seed_everything(plan.seed, "stage", index, "replica", gather.replica)
    throughput = Throughput(
        chain,
        stage.model,
        stage.objectives,
        pad=tokenizer.special.pad,
        replicas=gather.replicas,
        processes=ranks.world_size(),
        peak=_peak(run, device, dtype),
    )
    complete = functools.partial(
        _complete_stage, start.heartbeat, host, folder, stage, source_weights(plan, stage, run)
    )
    loop = StageLoop(plan, index, folder, host, tokenizer, throughput, progress, start.stop, start.heartbeat, found)
    with deterministic_operations(stage.parallel.deterministic):
        signal = loop.run(complete)
    if signal == 0:
        start.heartbeat.begin("finishing", stage.name, stage.steps)
        ranks.on_first(lambda: folder.mark_complete(stage.steps))
        if (message := ranks.on_first(lambda: _failed_evaluation(run, index, stage), str | None)) is not None:
            progress.message(message)
    del host, chain, throughput, complete, loop
    gc.collect()  # engines hold reference cycles, and the next stage needs the memory
    return signal


def _failed_evaluation(run: RunFolder, index: int, stage: StagePlan) -> str | None:
    """What to say where the evaluation after a stage's last step has failed."""
    problem = read_failed(run.stage(index, stage.name).unevaluated).get(stage.steps)
    if problem is None:
        return None
    return (
        f"stage {stage.name}: complete, but not evaluated, as its evaluation failed: {problem}\n"
        f"mend that, then: omnivl evaluate {run.path} --stage {stage.name}"
    )


def _complete_stage(
    heartbeat: Heartbeat, host: Host, folder: StageFolder, stage: StagePlan, source: Path | None
) -> None:
    """Writes the whole weights, from which later stages and exports start; only the evaluation may be missing then."""
    heartbeat.begin("finishing", stage.name, stage.steps)
    write_weights(host, folder.weights, source)
    ranks.on_first(lambda: folder.mark_trained(stage.steps, written_hash(folder.weights)))


def _show_result(run: RunFolder, plan: Plan, progress: Progress) -> None:
    """Shows the scores of the last evaluated stage and the routers of the last stage with routers, writes the page."""
    for index, stage in reversed(list(enumerate(plan.stages))):
        file = run.stage(index, stage.name).evaluation
        if file.is_file():
            _, scores = read_scores(file)
            progress.show(score_table(scores, f"{plan.name}, after stage {stage.name}"))
            break
    for index, stage in reversed(list(enumerate(plan.stages))):
        if health := last_health(training_records(run.stage(index, stage.name).metrics)):
            progress.show(
                health_table(health, list(stage.model.sparse.values()), f"Routers at the end of stage {stage.name}")
            )
            break
    for message in (_failed_evaluation(run, index, stage) for index, stage in enumerate(plan.stages)):
        if message is not None:
            progress.message(message)
    progress.message(f"report: {write_report(run.path)}")
    progress.message(f"try it: omnivl serve {run.path}")


def _peak(run: RunFolder, device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of this process' device, all processes measuring at once; written beside the environment."""
    ranks.barrier()
    peak = peak_of(device, dtype)
    if ranks.rank() == 0:
        environment = read_json(run.environment, dict, "give the same command again, which writes it anew")
        environment[f"peak_tflops_{str(dtype).removeprefix('torch.')}"] = round(peak.flops / 1e12, 3)
        environment["peak_source"] = peak.source
        _write_json(run.environment, environment)
    return peak


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1))
