"""Starts DeepSpeed: its configuration, the optimizer that it wraps, and patches of its defaults."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.hosts.zero.loops import reduce_without_loops
from engine.hosts.zero.sizes import ZeroSizes
from engine.hosts.zero.start import already_equal, import_without_compiler
from engine.plan.parallel import CommunicationDtype, Offloading
from engine.step.optimizer import ChainOptimizer, OptimizerConfig, ParameterGroup
from engine.step.report import scalars
from omnivl.chain.chain import Chain
from omnivl.chain.state import State


class LossModule(nn.Module):
    """The model that is given to DeepSpeed: it runs the chain and returns the loss and the scalars."""

    def __init__(self, chain: Chain, sign: nn.Module | None = None) -> None:
        """Wraps the chain; ``sign`` is ``ExpertParallel.sign``, which is never called."""
        super().__init__()
        self.chain, self.sign = chain, sign

    def forward(self, state: State, *, embeds: bool = False) -> tuple[Tensor, dict[str, Tensor]] | State:
        """The loss of one micro-batch, and its detached scalars; the state with the embeddings if that ``embeds``."""
        if embeds:
            embedded: State = self.chain(state, embeds=True)
            return embedded
        last = self.chain(state)
        return last["loss"], scalars(last)


def marked_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig, experts: str) -> ChainOptimizer:
    """The optimizer over the groups, of which DeepSpeed has to know those of split experts.

    Args:
        groups: From ``parameter_groups``.
        config: The optimizer.
        experts: DeepSpeed's name of the process groups over which groups that are ``apart`` are replicated.
    """
    marks = {"moe": True, "name": experts}
    return ChainOptimizer([group.options | (marks if group.apart else {}) for group in groups], config)


def zero_config(
    *,
    stage: int,
    gradient_clipping: float,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    sizes: ZeroSizes,
    offload: Offloading,
    communication_dtype: CommunicationDtype,
    replicas: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration. Fields that change results are given also where they equal its defaults.

    It sets no precision: parameters are fp32, and the chain casts to the type in which it computes.
    """
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, **sizes.as_config(stage)}
    if stage == 3:
        # A persistent parameter keeps a whole copy beside its partition: a momentum twin that moves by its partition
        # would leave that copy behind. Layers are gathered as wholes, so persistence would save nothing either.
        zero |= {"stage3_param_persistence_threshold": 0}
    if offload.optimizer:
        zero |= {**offload_config(offload), "overlap_comm": False}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        # With an offloaded optimizer, managed accumulation uses the gradients of the last micro-batch only: parameters
        # that only earlier micro-batches used would not be trained.
        "managed_gradient_accumulation": not offload.optimizer,
        # Stage 0 reports no norm: the host takes the norm and clips there.
        "gradient_clipping": gradient_clipping if stage > 0 else 0.0,
        # DeepSpeed would round the gradients of a single replica as well, which sends nothing.
        "communication_data_type": communication_dtype if replicas > 1 else "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def offload_config(offload: Offloading) -> dict[str, Any]:
    """The fields of DeepSpeed's section ``zero_optimization`` that say what is offloaded to the host's memory."""
    there = {"device": "cpu", "pin_memory": torch.cuda.is_available() and offload.folder is None}
    parts = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    return {part: there for part, wanted in parts.items() if wanted}


def import_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed and corrects side effects of the import. The default process group has to exist.

    Args:
        device: Where this process computes.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # a single process may have no launcher that sets it
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by deprecated names; PyTorch warns at each call.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # An optional shared-memory collective; compiling it takes most of a minute. Imported as a module, since the
        # attribute deepspeed.comm.torch may be PyTorch itself.
        vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    import_without_compiler()
    reduce_without_loops()
    # DeepSpeed keeps the grid of an earlier pipeline, and would average gradients over the replicas of its stage only.
    deepspeed.utils.groups.mpu = None
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def start_engine(module: LossModule, optimizer: ChainOptimizer, config: dict[str, Any]) -> Any:
    """Hands the chain to DeepSpeed, which ``import_deepspeed`` has made ready.

    Args:
        module: The model, equal on all replicas.
        optimizer: Over all trainable parameters of the chain.
        config: From ``zero_config``.

    Returns:
        The ``DeepSpeedEngine``. The package has no types.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    chain = module.chain
    assert all(p.dim() > 0 for p in chain.parameters()), "DeepSpeed fails on scalar parameters: give them shape [1]"
    if config["zero_optimization"]["stage"] == 3:
        for layer in chain.layers:
            set_z3_leaf_module(layer, True)  # gathered as a whole, whichever parts a step uses
    # Every ZeRO-3 engine adds its modules to this list, and none removes them: it would keep an earlier model alive.
    vars(importlib.import_module("deepspeed.runtime.zero.parameter_offload"))["FWD_MODULE_STACK"].clear()
    with _reducing_by_parameter(), _without_fp32_copies(), already_equal():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


@contextmanager
def _reducing_by_parameter() -> Iterator[None]:
    """Has ZeRO-3 reduce each gradient as soon as it is computed, also in leaf modules.

    DeepSpeed reduces the gradients of a leaf module in a full backward hook of that module. PyTorch runs such hooks for
    modules that return tensors or tuples of them; a chain layer returns a ``State``, the hook never runs, and no
    gradient of the layer would be reduced. Hooks of parameters run whatever the layer returns.
    """
    from deepspeed.runtime.zero import stage3

    original = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = original


@contextmanager
def _without_fp32_copies() -> Iterator[None]:
    """Has ZeRO-3's optimizer update the parameters themselves, which are fp32, instead of a copy of them.

    DeepSpeed intends this, but compares a device with the name of a device, which are never equal. Without this patch a
    process holds 20 bytes for each parameter of its share instead of 16.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    original = Stage3._create_fp32_partitions

    def shared(optimizer: Any) -> None:
        optimizer.device = torch.device(optimizer.device)
        original(optimizer)

    Stage3._create_fp32_partitions = shared
    try:
        yield
    finally:
        Stage3._create_fp32_partitions = original
