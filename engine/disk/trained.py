"""A trained stage on disk: found by its run, its folder, a checkpoint or a weights file; loaded for inference.

``weights.safetensors`` and checkpoints have whole weights by name, so every process builds the whole chain in bare
PyTorch: neither the host nor the number of processes of the training run matters here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.disk.aside import ASIDE
from engine.disk.checkpoint import MANIFEST
from engine.disk.run_folder import RunFolder, StageFolder
from engine.disk.saved import describe, find_checkpoint, saved_weights
from engine.errors import CheckpointError
from engine.hosts.weights import match_weights
from engine.plan.parse import load_plan
from engine.plan.plan import Plan, StagePlan
from engine.plan.precision import compute_dtype
from engine.processes.collectives import make_gather
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.names import only_trains
from omnivl.data.tokenizer import load_readers, load_tokenizer
from omnivl.errors import UserError, did_you_mean
from omnivl.inference.encoder import Encoder


@dataclass(frozen=True)
class Trained:
    """A stage whose weights can be loaded.

    Attributes:
        plan: The run's plan.
        stage: The stage.
        weights: Its weights: a ``.safetensors`` file, or the folder of a checkpoint.
        step: Optimizer steps that it took; None for weights outside of a run.
        run: The run's folder; None for weights outside of a run.
    """

    plan: Plan
    stage: StagePlan
    weights: Path
    step: int | None = None
    run: RunFolder | None = None


def find_trained(target: Path, stage: str | None = None, plan: Path | None = None) -> Trained:
    """Finds weights and the plan that describes them.

    Args:
        target: A run's folder, a stage's, that of a checkpoint, or a ``.safetensors`` file in a run or elsewhere.
        stage: Name of the stage; None takes the newest complete one of a run, the last one of a plan.
        plan: The plan of a file that lies outside of a run.

    Raises:
        UserError: There is no such run, plan or stage, or the stage is not complete.
    """
    if target.is_dir() and ((target / MANIFEST).is_file() or target.absolute().parent.name == "stages"):
        return _in_stage(target)
    if target.is_dir() or (not target.exists() and target.suffix != ".safetensors"):
        return _in_run(RunFolder(target), stage)
    if not target.is_file():
        raise CheckpointError(f"{target}: got a file that is not there; allowed a run folder or a .safetensors file")
    folder = target.resolve().parent
    run = RunFolder(folder.parents[1]) if folder.parent.name == "stages" else None
    if plan is None and run is not None and run.plan.is_file():
        own = _named_stage(read := load_plan(run.plan), stage or folder.name.partition("-")[2], str(run.plan))
        return Trained(read, own, target, StageFolder(folder).completed_steps(), run)
    if plan is None:
        raise UserError(
            f"{target}: got weights outside of a run folder; allowed with the plan that they were trained with; add "
            "--plan PLAN.yaml (and --stage NAME where it is not the plan's last stage)"
        )
    read = load_plan(plan)
    return Trained(read, _named_stage(read, stage or read.stages[-1].name, str(plan)), target)


def load_encoder(trained: Trained, device: torch.device, batch_size: int = 64) -> Encoder:
    """Builds the stage's chain, fills it, and puts it into evaluation mode. Called by every process.

    Args:
        trained: What to load.
        device: Where the chain computes.
        batch_size: Samples per forward pass and process.

    Raises:
        CheckpointError: The weights cannot be read or do not fit the stage's model.
    """
    stage, tokenizer, gather = trained.stage, load_tokenizer(trained.plan.tokenizer), make_gather()
    dtype = compute_dtype(stage.parallel, device)
    model = stage.model.portable()
    chain = build_chain(model, stage.objectives, tokenizer.special, gather=gather, compute_dtype=dtype)
    load_weights(chain, trained.weights)
    readers = load_readers(model.text_inputs, tokenizer)
    return Encoder(chain.to(device).eval(), model, tokenizer, gather, device, batch_size, readers)


def load_weights(chain: Chain, path: Path) -> None:
    """Loads everything that inference reads into a chain; momentum twins and queues may be missing or surplus.

    Raises:
        CheckpointError: The file cannot be read, a shape differs, or names are missing or unknown.
    """
    load_given(chain, dict(saved_weights(path)), str(path))


def load_given(chain: Chain, weights: Mapping[str, Tensor], path: str) -> None:
    """Likewise, of weights by name.

    Args:
        chain: Is filled.
        weights: Momentum twins and queues may be missing or surplus.
        path: Where they are from, for messages.

    Raises:
        CheckpointError: A shape differs, or names are missing or unknown.
    """
    own = {name: tensor for name, tensor in chain.state_dict().items() if not is_for_training(name)}
    given = {name: tensor for name, tensor in weights.items() if not is_for_training(name)}
    try:
        report = match_weights(_shapes(own), _shapes(given), strict=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if report.missing or report.unexpected:
        raise CheckpointError(
            f"{path}: got weights that do not fit the stage's model and objectives: missing {_listed(report.missing)}; "
            f"unknown {_listed(report.unexpected)}; name the stage that they belong to with --stage"
        )
    for name in report.matched:
        own[name].copy_(given[name])


def _in_run(run: RunFolder, name: str | None) -> Trained:
    """The stage of that name, or the newest complete one."""
    if not run.plan.is_file():
        siblings = [folder.parent.name for folder in sorted(run.path.absolute().parent.glob("*/plan.yaml"))]
        there = "is not there" if not run.path.exists() else "holds no plan.yaml"
        known = f" (beside it: {', '.join(siblings)})" if siblings else ""
        raise UserError(
            f"{run.path}: got a run folder that {there}; allowed the folder of a run, such as runs/quickstart{known}; "
            f"{did_you_mean(run.path.name, siblings, 'name one that omnivl pretrain has written')}"
        )
    plan = load_plan(run.plan)
    folders = {stage.name: run.stage(index, stage.name) for index, stage in enumerate(plan.stages)}
    complete = [stage for stage, folder in folders.items() if folder.completed_steps() is not None]
    if name is None and not complete:
        raise CheckpointError(f"{run.path}: got a run without a complete stage; finish one with omnivl pretrain")
    stage = _named_stage(plan, name or complete[-1], str(run.plan))
    folder = folders[stage.name]
    if stage.name not in complete:
        raise CheckpointError(
            f"{run.path}: got stage {stage.name!r}, which is not complete; allowed are the complete ones "
            f"({', '.join(complete) or 'none yet'}); finish it with omnivl pretrain, or choose another with --stage"
        )
    if not folder.weights.is_file():
        raise CheckpointError(f"{folder.weights}: not found, though stage {stage.name!r} is complete; train it again")
    return Trained(plan, stage, folder.weights, folder.completed_steps(), run)


def _in_stage(target: Path) -> Trained:
    """The stage that a folder belongs to: at its end if the folder is the stage's own, else at a checkpoint."""
    is_checkpoint = (target / MANIFEST).is_file()
    folder = StageFolder(target.absolute().parents[1] if is_checkpoint else target.absolute())
    run = RunFolder(folder.path.parents[1])
    if not run.plan.is_file():
        raise UserError(
            f"{target}: got a folder outside of a run; allowed are those below runs/NAME/stages, with "
            "the run's plan.yaml; take its weights out with omnivl checkpoint convert and name them with --plan"
        )
    plan = load_plan(run.plan)
    stage = _named_stage(plan, folder.path.name.partition("-")[2], str(run.plan))
    if not is_checkpoint and folder.weights.is_file():
        return Trained(plan, stage, folder.weights, folder.completed_steps(), run)
    checkpoint = find_checkpoint(target)
    return Trained(plan, stage, checkpoint, describe(checkpoint).step, run)


def _named_stage(plan: Plan, name: str, where: str) -> StagePlan:
    names = [stage.name for stage in plan.stages]
    if name not in names:
        change = did_you_mean(name, names, "name one of them")
        raise UserError(f"{where}: got stage {name!r}; allowed are {', '.join(map(repr, names))}; {change}")
    return plan.stage(name)


def is_for_training(name: str) -> bool:
    """Whether inference does not use a weight: a momentum twin's, a queue's, or one kept for a later stage."""
    return name.startswith(ASIDE) or only_trains(name)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _listed(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
