"""Results of the runs of a sweep: a row for each, read from its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from engine.disk.run_folder import RunFolder, StageFolder
from engine.estimate.trained import mark_trained
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from engine.processes.files import read_json
from engine.report.curves import Record, evaluation_records, training_records
from engine.sweep.config import Point, Sweep
from engine.watch.failure import read_failure
from moe.sparse import served_shares
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import load_tokenizer

_LAST_SHARE = 0.2
"""Share of a stage's lines of metrics over which final losses are averaged."""


def is_complete(folder: Path, stages: Sequence[StagePlan]) -> bool:
    """Whether a run has completed its plan."""
    run = RunFolder(folder)
    done = [run.stage(index, stage.name).completed_steps() for index, stage in enumerate(stages)]
    return all(steps is not None and steps >= stage.steps for steps, stage in zip(done, stages, strict=True))


def collect(sweep: Sweep, folder: Path) -> pd.DataFrame:
    """A row for each run of the sweep: its values, sizes, costs, losses and scores.

    Columns: ``run``, ``state`` (``complete``, ``failed`` or ``missing``), ``why``, the axes, then of complete runs
    ``parameters``, ``active_parameters``, ``flops`` and ``tokens`` (of training, all stages), ``samples``,
    ``seconds`` (of steps), ``loss`` and ``loss/NAME`` (of the last stage, over its last fifth), ``score/TASK/METRIC``,
    ``samples_per_second``, ``mfu``, ``memory_gib`` (of process 0), ``processes``, ``machine`` (and version and day),
    ``batch`` (samples of a step of the last stage, over all processes).

    Args:
        sweep: From ``load_sweep``.
        folder: Of its runs.
    """
    return pd.DataFrame([_row(point, folder / point.name) for point in sweep.points])


def _row(point: Point, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"run": point.name, "state": "missing", "why": "", **point.values}
    if (failure := read_failure(folder)) is not None:
        row |= {"state": "failed", "why": f"exit code {failure.code}: {failure.said}"}
    if not is_complete(folder, point.plan.stages):
        return row
    run = RunFolder(folder)
    written = load_plan(run.plan)
    stages = [run.stage(index, stage.name) for index, stage in enumerate(written.stages)]
    tokens = load_tokenizer(written.tokenizer).special
    environment = read_json(run.environment, dict, "remove it, and start the run again, which writes it anew")
    costs = [_costs(stage) for stage in stages]
    return {
        **row,
        **{"state": "complete", "why": ""},
        **_sizes(written.stages[-1], tokens),
        **{name: sum(cost[name] for cost in costs) for name in ("flops", "tokens", "samples", "seconds")},
        **_outcome(stages[-1]),
        "processes": environment["processes"],
        "machine": _machine(environment),
        "batch": round(costs[-1]["samples"] / written.stages[-1].steps),
    }


def _machine(environment: Mapping[str, Any]) -> str:
    device = environment["gpu"] or environment["cpu"]
    commit = (environment["git"] or {}).get("commit")
    source = f", commit {commit[:10]}" if commit else ""
    return f"{device}, torch {environment['torch']}{source}, {environment['started'][:10]}"


def _sizes(stage: StagePlan, tokens: SpecialTokens) -> dict[str, int]:
    """Trained parameters, and the number of them that one token uses."""
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, tokens)
    mark_trained(chain, stage)
    shares = served_shares(chain)
    trained = [one for one in chain.parameters() if one.requires_grad]
    active = sum(one.numel() * shares.get(id(one), 1.0) for one in trained)
    return {"parameters": sum(one.numel() for one in trained), "active_parameters": round(active)}


def _costs(stage: StageFolder) -> dict[str, float]:
    """Sums over the lines of a stage's metrics; each line has the means of the steps since the one before."""
    sums = {"flops": 0.0, "tokens": 0.0, "samples": 0.0, "seconds": 0.0}
    before = 0.0
    for record in training_records(stage.metrics):
        seconds = (record["step"] - before) * record["speed/seconds_per_step"]
        before = record["step"]
        sums["seconds"] += seconds
        sums["flops"] += 1e12 * record["speed/tflops"] * seconds
        sums["tokens"] += record["speed/tokens_per_second"] * seconds
        sums["samples"] += record["speed/samples_per_second"] * seconds
    return sums


def _outcome(stage: StageFolder) -> dict[str, float]:
    """Losses and speed of the stage's last fifth, and its last scores."""
    records = training_records(stage.metrics)
    last = records[-max(1, round(_LAST_SHARE * len(records))) :]
    losses = {name: name.replace("losses/", "loss/") for record in last for name in record if name.startswith("loss")}
    figures = {said: _mean(last, name) for name, said in losses.items()}
    for name in ("samples_per_second", "mfu", "memory_gib"):
        figures[name] = _mean(last, f"speed/{name}")
    evaluations = evaluation_records(stage.metrics)
    scores = (
        {f"score/{name}": value for name, value in evaluations[-1].items() if name != "step"} if evaluations else {}
    )
    return {**figures, **scores}


def _mean(records: Sequence[Record], name: str) -> float:
    values = [record[name] for record in records if name in record]
    return sum(values) / len(values)
