"""The chain that a stage starts with, built by layers, filled with earlier weights, sharded under ZeRO-3; and its host.

One process of the run draws and reads values; hosts make those of process 0 everyone's. The others build without
storage, by shapes alone, which costs next to nothing, and so does process 0 where a checkpoint is to follow.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from engine.disk.aside import HEADS
from engine.disk.run_folder import RunFolder, StageFolder, write_whole
from engine.disk.weights_file import WeightsFile, check_weights
from engine.errors import CheckpointError
from engine.hosts import Host, create_host, layer_sharder
from engine.hosts.pipeline.cut import divide_stage
from engine.plan.plan import Plan, StagePlan
from engine.plan.precision import compute_dtype
from engine.processes import ranks
from engine.processes.seeds import seed_everything
from engine.run.handover import Inheritance, hand_over
from engine.step.adapters import adapt_layer, frozen_at_random, train_adapters
from engine.step.optimizer import Origins
from engine.telemetry.progress import Progress, SilentProgress
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import Gather
from omnivl.chain.storage import give_storage
from omnivl.data.tokenizer import Tokenizer
from omnivl.pretrained.load import Part, load_pretrained, read_exported
from omnivl.randomness import stable_hash


def start_chain(
    plan: Plan,
    index: int,
    run: RunFolder,
    tokenizer: Tokenizer,
    gather: Gather,
    device: torch.device,
    progress: Progress,
    *,
    resumes: bool = False,
) -> tuple[Chain, Origins]:
    """Builds the chain of a stage with its starting values. Called by every process.

    Values are on process 0, on the CPU; elsewhere parameters and buffers are zeros on the device. Under ZeRO-3, where
    values are sent at once, a process holds one whole layer at a time and its share of the others. With weights of
    other origin process 0 holds the whole chain, on the CPU, until they are loaded.

    Args:
        plan: Without mistakes.
        index: Which stage.
        run: Folder with an earlier stage's weights; the report on the hand-over is written there.
        tokenizer: Its special tokens are built in.
        gather: The replicas.
        device: Where the chain is to run.
        progress: Displays the report on the weights that the stage starts from.
        resumes: Whether a checkpoint is to be loaded, which has all values: none are drawn or read then.

    Returns:
        The chain, and where its parameters come from.

    Raises:
        UserError: The weights are missing or do not fit.
    """
    stage = plan.stages[index]
    dtype = compute_dtype(stage.parallel, device)
    has_values = ranks.rank() == 0 and not resumes
    heritage = None if stage.init_from is None else _inheritance(plan, stage, run, shapes_only=not has_values)
    shard = layer_sharder(stage.parallel, device)
    foreign = stage.weights.folders
    whole_first = bool(foreign) or not has_values
    told: Progress = SilentProgress() if resumes else progress  # of values that are not used

    def adapt_and_shard(name: str, layer: ChainLayer) -> None:
        if stage.lora is not None:
            start = stable_hash(plan.seed, "lora", index)
            adapt_layer(name, layer, stage.lora, layouts=stage.layouts(), frozen=stage.freeze, seed=start)
        if not has_values:
            give_storage(layer, device)
        if shard is not None:
            shard(layer)

    def fill_and_settle(name: str, layer: ChainLayer) -> None:
        if heritage is not None:
            heritage.give(name, layer)
        if not whole_first:
            adapt_and_shard(name, layer)

    seed_everything(plan.seed, "weights", index)
    matched: set[str] = set()
    with nullcontext() if has_values else torch.device("meta"):
        chain = build_chain(
            stage.model, stage.objectives, tokenizer.special, gather=gather, compute_dtype=dtype, settle=fill_and_settle
        )
        for part, path in foreign.items():
            matched.update(_load_foreign(chain, stage, part, path, plan.seed, told, shapes_only=not has_values))
    for name, layer in chain.named_layers.items() if whole_first else ():
        adapt_and_shard(name, layer)
    inherited = copied = frozenset[str]()
    if heritage is not None:
        report = heritage.report()
        inherited, copied = frozenset(report.given), frozenset(report.copied)
        told.show(report.table(f"stage {stage.name}: weights from {stage.init_from}"))
        if not resumes:
            ranks.on_first(lambda: _write(run.stage(index, stage.name), report.as_json()))
    if stage.lora is not None:
        train_adapters(chain)
        if lost := frozen_at_random(chain, stage.layouts(), matched | inherited | copied):
            parts = ", ".join(f"{count / 1e6:.2f} M of {stack}" for stack, count in lost.items())
            said = "lora leaves frozen at random, as nothing was loaded into them"
            progress.message(f"stage {stage.name}: warning: {said}: {parts} (parameters)")
    return chain, Origins(foreign=frozenset(matched), earlier=inherited - matched)


def start_host(chain: Chain, stage: StagePlan, device: torch.device, origins: Origins | None = None) -> Host:
    """The host of a stage. Called by every process.

    Args:
        chain: From ``start_chain``, what the stage freezes marked as such.
        stage: Without mistakes.
        device: Where it runs.
        origins: Where its parameters come from; None: all are new.
    """
    return create_host(
        stage.parallel,
        chain,
        stage.optimizer,
        stage.objectives,
        total_steps=stage.steps,
        micro_batch_size=stage.batch.micro_batch_size_per_gpu,
        gradient_accumulation_steps=stage.batch.gradient_accumulation_steps,
        device=device,
        origins=origins,
        division=divide_stage(chain, stage),
        contrasts_step=stage.contrasts_step,
    )


def source_weights(plan: Plan, stage: StagePlan, run: RunFolder) -> Path | None:
    """The weights file that the stage starts from; None for a stage that starts from none."""
    if stage.init_from is None:
        return None
    return run.stage([earlier.name for earlier in plan.stages].index(stage.init_from), stage.init_from).weights


def _load_foreign(
    chain: Chain, stage: StagePlan, part: Part, path: str, seed: int, progress: Progress, *, shapes_only: bool
) -> Collection[str]:
    """Fills a whole chain from a folder of Hugging Face's form; returns the names of filled parameters."""
    if (exported := read_exported(Path(path), part, shapes_only=shapes_only)) is None:
        loaded = load_pretrained(chain, stage.model, Path(path), part=part, shapes_only=shapes_only)
        for line in loaded.lines():
            progress.message(line)
        return loaded.matched
    own = chain.state_dict().keys()
    behind = [name for name in exported if name.startswith(HEADS) and name not in own]
    if behind:
        heads = sorted({".".join(name.split(".")[1:3]) for name in behind})
        progress.message(f"weights.{part}: left out, as stage {stage.name} has no such head: {', '.join(heads)}")
    given = {name: tensor for name, tensor in exported.items() if name not in behind}
    noise = {} if shapes_only else _noise(stage)
    report = hand_over(chain, given, path, starts_from=stage.model.starts_from, upcycle_noise=noise, seed=seed)
    progress.show(report.table(f"stage {stage.name}: weights.{part} from {path}"))
    return report.given


def _noise(stage: StagePlan) -> Mapping[str, float]:
    return {stack: ffn.upcycle_noise for stack, ffn in stage.model.sparse.items()}


def _inheritance(plan: Plan, stage: StagePlan, run: RunFolder, *, shapes_only: bool) -> Inheritance:
    source = source_weights(plan, stage, run)
    assert source is not None
    assert stage.init_from is not None
    if not source.is_file():
        raise CheckpointError(
            f"stages.{stage.name}.init_from: got {stage.init_from!r}, which is not complete: {source} is "
            "missing; run that stage first"
        )
    ranks.on_first(lambda: check_weights(source))
    stored = WeightsFile(source)
    return Inheritance(
        stored.names,
        stored.read_shapes if shapes_only else stored.read,
        stage.init_from,
        starts_from=stage.model.starts_from,
        upcycle_noise={} if shapes_only else _noise(stage),
        seed=plan.seed,
    )


def _write(folder: StageFolder, report: object) -> None:
    folder.handover.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder.handover, json.dumps(report, indent=1))
