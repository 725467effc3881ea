"""Fewer experts for a finished stage: pruned or merged step by step, down to a dense model, each step measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.disk.run_folder import RunFolder
from engine.disk.trained import Trained, is_for_training, load_given
from engine.errors import CheckpointError
from engine.finished.evaluate import evaluate
from engine.plan.evaluation import provided_in
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan, WeightsConfig
from engine.plan.precision import compute_dtype
from engine.run.handover import hand_over
from moe.config import DenseConfig, FeedForwardConfig, LIMoEConfig, MoMELIMoEConfig
from moe.experts.products import perceptron
from moe.reduce import merge, output_similarity, pools_of, prune, reduced, reduced_config, router_similarity
from moe.routers.base import LinearRouter
from moe.slot import FeedForwardOutput
from moe.sparse import SparseFeedForward
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.errors import UserError, reason_of
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.tasks import TaskConfig
from omnivl.tasks.results import Score
from omnivl.tasks.routing.tokens import read_beside

How = Literal["prune", "merge"]
Similarity = Literal["router", "outputs"]
Keep = int | Literal["dense"]
"""Most experts of a pool of each layer; ``dense``: one perceptron in place of router and experts."""

_SAMPLED = 256
"""Tokens of each call of a layer whose outputs are compared."""
_BESIDE = 64
"""Pairs that decoders read in one pass."""


@dataclass
class Use:
    """What a layer's experts did on some data.

    Attributes:
        counts: Tokens that chose each expert.
        tokens: Some of the layer's inputs, fp32.
    """

    counts: Tensor
    tokens: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A model of some size, and what it scores.

    Attributes:
        trained: The plan and stage that describe it; ``weights`` are those of the original.
        encoder: The model.
        keep: What it was reduced to; None: the model as it was.
        groups: The experts of the model before that became one, by layer.
        counts: Tokens that chose each expert of the model before, by layer.
        parameters: Number of parameters, without momentum twins.
        scores: Of the tasks.
    """

    trained: Trained
    encoder: Encoder
    keep: Keep | None
    groups: Mapping[str, Sequence[Sequence[int]]]
    counts: Mapping[str, Sequence[int]]
    parameters: int
    scores: Sequence[Score]

    def as_json(self) -> dict[str, Any]:
        """Plain containers."""
        scores = [{"task": one.task, "metric": one.metric, "value": one.value} for one in self.scores]
        groups = {name: [list(group) for group in groups] for name, groups in self.groups.items()}
        counts = {name: list(own) for name, own in self.counts.items()}
        return {"keep": self.keep, "parameters": self.parameters, "scores": scores, "groups": groups, "counts": counts}


def reduce_experts(
    trained: Trained,
    encoder: Encoder,
    keeps: Sequence[Keep],
    how: How,
    similarity: Similarity,
    pictures: PictureSet,
    tasks: Sequence[TaskConfig],
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Step]:
    """The model as it is, then after each step; every step starts from the one before and counts anew.

    Args:
        trained: A stage with sparse experts.
        encoder: From ``load_encoder``, on one process.
        keeps: What is left after each step, falling.
        how: Whether experts are taken out or merged.
        similarity: By what experts are merged.
        pictures: Data on which use is counted, pictures or clips with captions.
        tasks: Are run after each step.
        tell: Called with what begins.

    Raises:
        UserError: The stage has no sparse experts, or a step does not fit it.
    """
    check_keeps(trained, keeps)
    yield _measured(trained, encoder, None, {}, {}, tasks, tell)
    for keep in keeps:
        tell(f"counting tokens of {len(slots_of(encoder.chain))} layers")
        uses = expert_use(encoder, pictures)
        groups = {name: _groups(slot, uses[name], keep, how, similarity) for name, slot in _slots(encoder)}
        trained, encoder = _rebuilt(trained, encoder, keep, groups, uses)
        counts = {name: use.counts.long().tolist() for name, use in uses.items()}
        yield _measured(trained, encoder, keep, groups, counts, tasks, tell)


def check_keeps(trained: Trained, keeps: Sequence[Keep]) -> None:
    """Refuses steps that a stage's model cannot take.

    Raises:
        UserError: See ``reduce_experts``.
    """
    sparse = trained.stage.model.sparse
    if not sparse:
        raise UserError(
            f"{trained.weights}: got a stage with feed-forward layers {trained.stage.model.kinds_of_filling}; allowed "
            "is one with sparse experts ('limoe', 'mome_limoe'); name another stage with --stage"
        )
    sizes = [0 if keep == "dense" else keep for keep in keeps]
    if any(one <= other for one, other in pairwise(sizes)):
        raise UserError(
            f"--keep: got {','.join(map(str, keeps))}; allowed are falling numbers, dense the last; sort them"
        )
    for stack, config in sparse.items():
        most = max(map(len, pools_of(config)))
        for keep in keeps:
            if keep == "dense":
                _check_dense(stack, config)
                continue
            try:
                reduced_config(config, keep)
            except ValueError as error:
                raise UserError(f"--keep: stack {stack!r}: {error}; raise it") from error
            if keep >= most and len(sparse) == 1:
                raise UserError(f"--keep: got {keep} of {most} experts; allowed is fewer; lower it")
    for keep in keeps:
        _described(trained, keep)


def _check_dense(stack: str, config: LIMoEConfig | MoMELIMoEConfig) -> None:
    for option, value, plain in (
        ("expert_ratio", config.expert_ratio, 1.0),
        ("shared_experts", config.shared_experts, 0),
    ):
        if value != plain:
            raise UserError(
                f"--keep: got 'dense' for stack {stack!r} with ffn.{option} {value}; allowed is {plain:g}, as a dense "
                "layer has one perceptron of its own size; leave 'dense' out"
            )


def slots_of(chain: Chain) -> dict[str, SparseFeedForward]:
    """The sparse layers of a chain by their names, without those of momentum twins."""
    return {
        name: module
        for name, module in chain.named_modules()
        if isinstance(module, SparseFeedForward) and not is_for_training(name)
    }


def _slots(encoder: Encoder) -> list[tuple[str, SparseFeedForward]]:
    return list(slots_of(encoder.chain).items())


@torch.no_grad()
def expert_use(encoder: Encoder, pictures: PictureSet) -> dict[str, Use]:
    """Runs pictures and captions through encoders and decoders and counts the choices of each sparse layer.

    Decoders read each picture beside its caption, as far as an objective of the stage predicts from both.

    Args:
        encoder: The model.
        pictures: Pictures or clips.
    """
    with _noting(slots_of(encoder.chain)) as uses:
        encoder.pictures(pictures)
        told = [index for index in range(len(pictures)) if pictures.samples[index].captions]
        captions = [pictures.samples[index].captions[0] for index in told]
        if captions:
            encoder.texts(captions)
        for first in range(0, len(told), _BESIDE):
            indices, own = told[first : first + _BESIDE], captions[first : first + _BESIDE]
            frames, token_ids = pictures.frames(indices).to(encoder.device), encoder.token_ids(own)
            for objective in encoder.chain.objectives:
                read_beside(encoder, objective, frames, token_ids)
    return uses


@contextmanager
def _noting(slots: Mapping[str, SparseFeedForward]) -> Iterator[dict[str, Use]]:
    uses = {name: Use(torch.zeros(slot.config.num_experts)) for name, slot in slots.items()}

    def note(name: str, slot: SparseFeedForward, inputs: tuple[Any, ...], made: FeedForwardOutput) -> None:
        assert made.router_sums is not None
        uses[name].counts += slot.tokens_per_expert(made.router_sums).cpu()
        rows, valid = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1].valid
        rows = rows if valid is None else rows[valid]
        uses[name].tokens.append(rows[:: max(1, len(rows) // _SAMPLED)][:_SAMPLED].float().cpu())

    def hook_of(name: str) -> Any:
        return lambda slot, inputs, made: note(name, slot, inputs, made)

    hooks = [slot.register_forward_hook(hook_of(name)) for name, slot in slots.items()]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()


def _groups(slot: SparseFeedForward, use: Use, keep: Keep, how: How, similarity: Similarity) -> list[list[int]]:
    """The partition of a layer's experts; a dense layer is made of one group, whatever the pools."""
    everyone = [list(range(slot.config.num_experts))]
    pools, most = (everyone, 1) if keep == "dense" else (pools_of(slot.config), keep)
    if how == "prune":
        return prune(use.counts, pools, most)
    return merge(use.counts, _similarity(slot, use, similarity), pools, most)


@torch.no_grad()
def _similarity(slot: SparseFeedForward, use: Use, similarity: Similarity) -> Tensor:
    if similarity == "router":
        assert isinstance(slot.router, LinearRouter), "every router of the union has rows"
        return router_similarity(slot.router.gate.weight.cpu())
    bank = slot.experts
    tokens = torch.cat(use.tokens) if use.tokens else torch.zeros(1, bank.hidden_size)
    weights = [one.float().cpu() for one in (bank.fc1_weight, bank.fc1_bias, bank.fc2_weight, bank.fc2_bias)]
    outputs = [perceptron(tokens, *(one[expert] for one in weights)) for expert in range(bank.num_experts)]
    return output_similarity(torch.stack(outputs))


@torch.no_grad()
def _rebuilt(
    trained: Trained,
    encoder: Encoder,
    keep: Keep,
    groups: Mapping[str, list[list[int]]],
    uses: Mapping[str, Use],
) -> tuple[Trained, Encoder]:
    """The model with groups in place of experts."""
    weights = reduced_weights(encoder.chain, groups, {name: use.counts for name, use in uses.items()})
    plan, model = _described(trained, keep), encoder.model.refilled(partial(_refill, keep=keep))
    stage, special = plan.stages[0], encoder.tokenizer.special
    dtype = compute_dtype(stage.parallel, encoder.device)
    chain = build_chain(model, stage.objectives, special, gather=encoder.gather, compute_dtype=dtype)
    if keep == "dense":
        report = hand_over(chain, weights, trained.stage.name, starts_from=model.starts_from)
        lost = [name for name in report.created if not is_for_training(name)]
        assert not lost, f"a dense layer takes the place of one expert; fresh are {lost}"
    else:
        load_given(chain, weights, str(trained.weights))
    new = replace(trained, plan=plan, stage=stage)
    return new, replace(encoder, chain=chain.to(encoder.device).eval(), model=model)


def reduced_weights(
    chain: Chain, groups: Mapping[str, Sequence[Sequence[int]]], counts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A chain's weights with groups in place of experts, without what only trains.

    Args:
        chain: With sparse layers.
        groups: By layer, see ``slots_of``.
        counts: Tokens of each expert, by layer.
    """
    weights = {name: one.cpu() for name, one in chain.state_dict().items() if not is_for_training(name)}
    for slot, own in groups.items():
        inner = {name.removeprefix(f"{slot}."): one for name, one in weights.items() if name.startswith(f"{slot}.")}
        weights |= {f"{slot}.{name}": one for name, one in reduced(inner, own, counts[slot]).items()}
    return weights


def _refill(ffn: FeedForwardConfig, keep: Keep) -> FeedForwardConfig:
    if not isinstance(ffn, LIMoEConfig | MoMELIMoEConfig):
        return ffn
    return DenseConfig() if keep == "dense" else reduced_config(ffn, keep)


def _described(trained: Trained, keep: Keep) -> Plan:
    """A plan of the one stage with the smaller model, which starts from nothing, and with the tasks that it can do.

    Raises:
        UserError: Something else in the stage does not fit the smaller model.
    """
    model = trained.stage.model.refilled(partial(_refill, keep=keep))
    parallel = replace(trained.stage.parallel, expert_parallel_size=1)
    stage = replace(trained.stage, model=model, parallel=parallel, init_from=None, weights=WeightsConfig())
    plan = replace(trained.plan, model=model, parallel=parallel, stages=(stage,))
    provided, before = provided_in(plan, stage), stage.evaluate
    tasks, curve = (tuple(one for one in own if not one.lacks(provided)) for _, own in before.lists)
    if (tasks, curve) != (before.tasks, before.curve.tasks):  # the figure of one of them may choose checkpoints
        evaluation = replace(before, tasks=tasks, curve=replace(before.curve, tasks=curve), keep_best=None)
        stage = replace(stage, evaluate=evaluation)
        plan = replace(plan, stages=(stage,), checkpoint=replace(plan.checkpoint, keep_best=None))
    return parse_plan(plan.to_yaml(), f"{plan.name} with {keep} experts" if keep != "dense" else f"{plan.name}, dense")


def _measured(
    trained: Trained,
    encoder: Encoder,
    keep: Keep | None,
    groups: Mapping[str, Sequence[Sequence[int]]],
    counts: Mapping[str, Sequence[int]],
    tasks: Sequence[TaskConfig],
    tell: Callable[[str], None],
) -> Step:
    """Scores by the tasks that the model has the parts for: one of routers has none to look at in a dense model."""
    provided = provided_in(trained.plan, trained.stage)
    able = [task for task in tasks if not task.lacks(provided)]
    evaluation = evaluate(trained, able, encoder, lambda task: tell(f"evaluating {task}"))
    scores = [score for result in evaluation.results for score in result.scores]
    named = encoder.chain.named_parameters()
    parameters = sum(one.numel() for name, one in named if not is_for_training(name))
    return Step(trained, encoder, keep, groups, counts, parameters, scores)


def write_run(step: Step, out: Path) -> Path:
    """Writes a model as the folder of a run of one complete stage, which every command reads as it does a run's.

    Args:
        step: The model.
        out: A new or empty folder.

    Raises:
        CheckpointError: It is taken, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: got a place that is taken; allowed is a new or empty folder; name another")
    run, stage = RunFolder(out), step.trained.stage
    folder = run.stage(0, stage.name)
    own = step.encoder.chain.state_dict()
    weights = {name: one.cpu().contiguous() for name, one in own.items() if not is_for_training(name)}
    environment = None if step.trained.run is None else step.trained.run.environment
    try:
        folder.path.mkdir(parents=True)
        run.plan.write_text(step.trained.plan.to_yaml(), encoding="utf-8")
        known = environment is not None and environment.is_file()
        run.environment.write_text(environment.read_text() if known and environment is not None else "{}")
        save_file(weights, folder.weights)
        folder.mark_complete(step.trained.step or stage.steps)
    except OSError as error:
        raise CheckpointError(f"{out}: could not be written ({reason_of(error)}); choose another place") from error
    return out
