"""The optimizer of a chain: its configuration, the groups of its parameters, and their steps.

Each trainable parameter is in exactly one group. The parameters of a group share a weight decay and a learning-rate
scale; the scale is the product of the layer-wise decay and the scales of pretrained parts, of new heads and of named
parts. Experts that are split over processes have separate groups, and so have matrices that Muon moves.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from engine.step.freeze import named_by
from engine.step.muon import MatrixSteps, MuonConfig, matrices_in, move_matrices
from engine.step.schedule import Schedule, learning_rate_factor
from engine.step.whole import whole_shape
from moe.ranges import Range
from omnivl.chain.chain import Chain
from omnivl.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square, by the names that torch gives them."""
MUON_MOMENTS = MOMENTS[:1]

_Decay = Annotated[float, Range(0, below=1)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon beside it, the learning-rate schedule and gradient clipping.

    Attributes:
        kind: ``adamw`` for everything; ``muon`` for the matrices of blocks, and AdamW for everything else: embeddings,
            heads, routers, biases, norms.
        lr: Peak learning rate of new parameters in the topmost layers.
        betas: Decay of the running mean of the gradient and of its square.
        eps: Added to the denominator of the update.
        weight_decay: Decoupled weight decay of matrices and kernels. Biases, norms, other one-dimensional parameters,
            embeddings, special tokens and temperatures are never decayed.
        schedule: Shape of the learning rate after the warm-up.
        warmup_steps: Steps of linear rise from 0; 0 for none.
        final_lr_ratio: Last learning rate over the peak, for ``linear`` and ``cosine``.
        gradient_clipping: Largest global gradient norm; 0 clips nothing.
        layer_decay: Learning-rate factor from each block of a stack to the one below it; 1 for none. The embedding
            layer lies below the lowest block of the deepest stack. Layers outside stacks have a factor of 1.
        pretrained_lr_scale: Learning-rate factor of parameters that were loaded from a checkpoint of other origin.
        new_head_lr_scale: Learning-rate factor of heads of objectives whose values come from neither an earlier stage
            nor a checkpoint. METER (arXiv 2111.02387) has 5 to 50 in its settings of fine-tuning.
        lr_scales: Learning-rate factors of parts, by patterns over the beginnings of parameter names as in ``freeze``,
            e.g. ``{visual_*: 0.1, contrast: 2}``. Of several patterns that name a parameter the first counts.
        muon: Muon's own options, with ``kind: muon``.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Range(above=0)] = 1e-4
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    eps: Annotated[float, Range(above=0)] = 1e-8
    weight_decay: Annotated[float, Range(0)] = 0.05
    schedule: Schedule = "cosine"
    warmup_steps: Annotated[int, Range(0)] = 0
    final_lr_ratio: Annotated[float, Range(0, 1)] = 0.0
    gradient_clipping: Annotated[float, Range(0)] = 1.0
    layer_decay: Annotated[float, Range(above=0, high=1)] = 1.0
    pretrained_lr_scale: Annotated[float, Range(above=0)] = 1.0
    new_head_lr_scale: Annotated[float, Range(above=0)] = 1.0
    lr_scales: Mapping[str, Annotated[float, Range(above=0)]] = field(default_factory=dict)
    muon: MuonConfig = field(default_factory=MuonConfig)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The rate of a group with scale 1 in optimizer step ``step`` (from 0) of ``total_steps``."""
        return self.lr * learning_rate_factor(
            step,
            total_steps,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            final_ratio=self.final_lr_ratio,
        )


@dataclass(frozen=True)
class Origins:
    """Where the starting values of a chain's parameters come from. All others are random.

    Attributes:
        foreign: Names of those from a checkpoint of other origin.
        earlier: Names of those from an earlier stage.
    """

    foreign: Collection[str] = ()
    earlier: Collection[str] = ()


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay and a learning-rate scale.

    Attributes:
        name: ``matrices`` of Muon, ``decay`` or ``no_decay``, with ``_xSCALE`` behind it where the scale is not 1.
        weight_decay: Decoupled weight decay.
        lr_scale: Factor on the scheduled learning rate of AdamW.
        names: Parameter names within the chain, in the order of ``parameters``.
        parameters: The parameters themselves.
        apart: Whether other processes hold other parameters of the same names: experts that are split over processes.
        muon: Options of Muon, which moves the parameters; None: AdamW does.
    """

    name: str
    weight_decay: float
    lr_scale: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    apart: bool = False
    muon: MuonConfig | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The entry of an optimizer's ``param_groups`` but for the learning rate."""
        moved = {} if self.muon is None else {"muon": self.muon}
        return {"params": list(self.parameters), "weight_decay": self.weight_decay, **moved}


def parameter_groups(
    chain: Chain,
    config: OptimizerConfig,
    origins: Origins | None = None,
    apart: Collection[str] = (),
    *,
    divide: bool = False,
) -> list[ParameterGroup]:
    """Sorts the trainable parameters of a chain into optimizer groups.

    Args:
        chain: Its layers say what depth they have, and which of their parameters are not decayed or belong to heads.
        config: Weight decay and learning-rate scales.
        origins: Where starting values come from; None: all are random.
        apart: Names of parameters that need groups of their own.
        divide: Whether parameters that momentum twins follow have groups of their own.

    Returns:
        Groups in order of first appearance, the same on every replica.

    Raises:
        UserError: Nothing is trainable, or a pattern of ``lr_scales`` names nothing.
    """
    depth_scales = layer_scales(chain, config.layer_decay)
    part_scales = scales_of_parts(config.lr_scales, [name for name, _ in chain.named_parameters()])
    undecayed = {id(parameter) for layer in chain.layers for parameter in layer.undecayed()}
    of_heads = {id(parameter) for layer in chain.layers for parameter in layer.head_parameters()}
    origins = Origins() if origins is None else origins
    matrices = muon_parameters(chain, config)
    followed = {id(parameter) for parameter in chain.followed_parameters()} if divide else set()
    members: dict[tuple[str, float, bool, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in chain.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = len(whole_shape(parameter)) > 1 and id(parameter) not in undecayed
        sort = "matrices" if id(parameter) in matrices else "decay" if decayed else "no_decay"
        scale = depth_scales[name.split(".", 1)[0]] * part_scales.get(name, 1.0)
        if name in origins.foreign:
            scale *= config.pretrained_lr_scale
        elif id(parameter) in of_heads and name not in origins.earlier:
            scale *= config.new_head_lr_scale
        members[sort, scale, name in apart, id(parameter) in followed].append((name, parameter))
    groups = [
        ParameterGroup(
            name=sort + ("" if scale == 1.0 else f"_x{scale:g}"),
            weight_decay={"decay": config.weight_decay, "matrices": config.muon.weight_decay}.get(sort, 0.0),
            lr_scale=scale * (config.muon.lr / config.lr if sort == "matrices" else 1.0),
            names=tuple(name for name, _ in entries),
            parameters=tuple(parameter for _, parameter in entries),
            apart=split,
            muon=config.muon if sort == "matrices" else None,
        )
        for (sort, scale, split, _), entries in members.items()
    ]
    _assert_partition(chain, groups)
    if not groups:
        raise UserError("optimizer: no parameter is trainable; got a stage that freezes every part: thaw one of them")
    return groups


def scales_of_parts(lr_scales: Mapping[str, float], parameters: Sequence[str]) -> dict[str, float]:
    """The factor of each parameter that a pattern of ``lr_scales`` names.

    Raises:
        UserError: A pattern names nothing.
    """
    found: dict[str, float] = {}
    for pattern, scale in lr_scales.items():
        for name in named_by(pattern, parameters, "optimizer.lr_scales"):
            found.setdefault(name, scale)
    return found


def layer_scales(chain: Chain, layer_decay: float) -> dict[str, float]:
    """Learning-rate factor of each layer, by name, from its depth below the top of its stack.

    Block ``i`` of a stack of ``n`` gets ``layer_decay ** (n - i)``; layers below all stacks (``i = -1``) count as part
    of the deepest one; all others get 1. Each stack counts from its own top: although the chain is one list, the towers
    are parallel, and a count along the list would give the visual tower almost no learning rate.

    Source: BEiT (arXiv 2106.08254), appendix on fine-tuning: layer-wise learning-rate decay.
    """
    depths = Counter(layer.stack for layer in chain.layers if layer.level is not None and layer.level >= 0)
    deepest = max(depths.values(), default=0)
    return {
        name: 1.0 if layer.level is None else layer_decay ** (depths.get(layer.stack, deepest) - layer.level)
        for name, layer in chain.named_layers.items()
    }


class ChainOptimizer(torch.optim.AdamW):
    """AdamW, which leaves groups with ``muon`` to Muon; its step does nothing while ``skip_step`` is set.

    DeepSpeed itself skips a step whose gradient norm is not finite, but does not look at the loss.

    Attributes:
        skip_step: Whether ``step`` leaves everything as it is, whoever calls it.
        matrix_steps: By the ids of tensors that Muon moves, where matrices lie in them. The host sets it, which knows
            what it shards.
    """

    def __init__(self, entries: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
        """Rates are 0 until ``set_learning_rates`` sets them, which must be called before each step.

        Args:
            entries: ``ParameterGroup.options`` of each group, and what the host adds.
            config: Betas and eps.
        """
        # One kernel per group is the fastest on CPU and GPU.
        super().__init__(list(entries), lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        self.skip_step = False
        self.matrix_steps: dict[int, MatrixSteps] = {}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves the weights, unless ``skip_step`` is set."""
        if self.skip_step:
            return None
        groups = self.param_groups
        for group in groups:
            if "muon" in group:
                move_matrices(group, self.state, self.matrix_steps)
        self.param_groups = [group for group in groups if "muon" not in group]
        try:
            loss: float | None = super().step(closure)
            return loss
        finally:
            self.param_groups = groups

    def moment_names(self, tensor: Tensor) -> tuple[str, ...]:
        """The names under which the optimizer's state has the moments of one of its tensors."""
        return MUON_MOMENTS if id(tensor) in self.matrix_steps else MOMENTS


def set_learning_rates(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], base_lr: float
) -> Mapping[str, float]:
    """Sets the rate of every group to ``base_lr`` times its scale and returns the rates by group name."""
    assert len(optimizer.param_groups) == len(groups), "the optimizer was not built from these groups"
    rates = {group.name: base_lr * group.lr_scale for group in groups}
    for entry, group in zip(optimizer.param_groups, groups, strict=True):
        entry["lr"] = rates[group.name]
    return rates


def _assert_partition(chain: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    trainable = {id(parameter) for parameter in chain.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups"
    assert set(grouped) == trainable, "a trainable parameter is in no optimizer group"


def muon_parameters(chain: Chain, config: OptimizerConfig) -> frozenset[int]:
    """Ids of the parameters that Muon moves where they are trained: those that hold matrices of blocks.

    What a layer does not decay holds tables, not matrices.
    """
    found = set()
    for layer in chain.layers if config.kind == "muon" else ():
        if layer.level is None or layer.level < 0:
            continue
        stacked, undecayed = matrices_in(layer), {id(parameter) for parameter in layer.undecayed()}
        for parameter in layer.parameters():
            known = stacked.get(id(parameter))
            is_table = id(parameter) in undecayed or (known is not None and known.count == 0)
            if len(whole_shape(parameter)) > 1 and not is_table:
                found.add(id(parameter))
    return frozenset(found)
