"""Starts DeepSpeed: its configuration, the optimizer that it wraps, and what has to be put right around its start."""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.parallel import Offloading
from engine.step.optimizer import OptimizerConfig, ParameterGroup
from engine.step.report import scalars
from omnivl.chain.chain import Chain
from omnivl.chain.state import State


class Program(nn.Module):
    """What DeepSpeed sees as the model: the chain, reduced to its loss and its scalars."""

    def __init__(self, chain: Chain, sign: nn.Module | None = None) -> None:
        """Wraps the chain; ``sign`` is ``ExpertParallel.sign``, which is never called."""
        super().__init__()
        self.chain, self.sign = chain, sign

    def forward(self, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and its detached scalars."""
        last = self.chain(state)
        return last["loss"], scalars(last)


class SkippingAdamW(torch.optim.AdamW):
    """AdamW whose step can be told to do nothing, whoever calls it.

    DeepSpeed skips a step whose gradient norm is not finite by itself, but knows nothing of a loss that is not.
    """

    skip_step = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves the weights, unless ``skip_step`` is set."""
        return None if self.skip_step else super().step(closure)


def skipping_adamw(groups: Sequence[ParameterGroup], config: OptimizerConfig, experts: str) -> SkippingAdamW:
    """AdamW over the groups. Rates are 0 until the first step sets them.

    Args:
        groups: From ``parameter_groups``.
        config: Betas and eps.
        experts: What DeepSpeed calls the process groups over which groups that are ``apart`` are replicated.
    """
    entries = [
        {
            **{"params": list(group.parameters), "weight_decay": group.weight_decay},
            **({"moe": True, "name": experts} if group.apart else {}),
        }
        for group in groups
    ]
    return SkippingAdamW(entries, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def zero_config(
    *,
    stage: int,
    gradient_clipping: float,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    sizes: ZeroSizes,
    offload: Offloading,
    communication_dtype: Literal["fp32", "bf16"],
) -> dict[str, Any]:
    """DeepSpeed's configuration. Everything that changes results is written, whatever the defaults of the day are.

    Precision is none of DeepSpeed's business here: parameters are fp32 and the chain computes in its own type.
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
        # With an offloaded optimizer, managed accumulation hands over only those gradients that the last micro-batch
        # brought: a layer that only earlier ones used would not move.
        "managed_gradient_accumulation": not offload.optimizer,
        # Stage 0 reports no norm: the host takes the norm and clips there.
        "gradient_clipping": gradient_clipping if stage > 0 else 0.0,
        "communication_data_type": communication_dtype,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def offload_config(offload: Offloading) -> dict[str, Any]:
    """The fields of DeepSpeed's section ``zero_optimization`` that say what lies in the memory of the host."""
    there = {"device": "cpu", "pin_memory": torch.cuda.is_available() and offload.folder is None}
    parts = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    return {part: there for part, wanted in parts.items() if wanted}


def import_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed and puts right what its import leaves. The default process group has to exist.

    Args:
        device: Where this process computes.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # a lone process may have no launcher that sets it
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that PyTorch has renamed: one warning per call, and nobody here can mend it.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # An optional shared-memory collective that would be compiled for most of a minute.
        # Looked up as a module: the attribute deepspeed.comm.torch may as well be PyTorch itself.
        vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    # The grid of an earlier pipeline would be this engine's too, and average its gradients over a stage's replicas.
    deepspeed.utils.groups.mpu = None
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def start_engine(program: Program, optimizer: SkippingAdamW, config: dict[str, Any]) -> Any:
    """Hands the chain to DeepSpeed, which ``import_deepspeed`` has made ready.

    Args:
        program: The model. Its parameters become those of replica 0.
        optimizer: Over all trainable parameters of the chain.
        config: From ``zero_config``.

    Returns:
        The ``DeepSpeedEngine``. The package has no types.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    chain = program.chain
    assert all(p.dim() > 0 for p in chain.parameters()), "DeepSpeed fails on scalar parameters: give them shape [1]"
    if config["zero_optimization"]["stage"] == 3:
        for layer in chain.layers:
            set_z3_leaf_module(layer, True)  # gathered as a whole, whichever parts a step uses
    # A list to which every ZeRO-3 engine adds its modules and from which it never takes them: an earlier stage's model.
    vars(importlib.import_module("deepspeed.runtime.zero.parameter_offload"))["FWD_MODULE_STACK"].clear()
    with _reduced_by_parameter(), _masters_shared():
        engine, *_ = deepspeed.initialize(model=program, optimizer=optimizer, config=config)
    return engine


@contextmanager
def _reduced_by_parameter() -> Iterator[None]:
    """Lets ZeRO-3 reduce each gradient when it is ready, in leaf modules too.

    DeepSpeed reduces the gradients of a leaf module in a full backward hook of that module. PyTorch runs such hooks for
    modules that return tensors or tuples of them; a chain layer returns a ``State``, the hook never runs, and no
    gradient of the layer would ever arrive. Hooks of the parameters do not care what the layer returns.
    """
    from deepspeed.runtime.zero import stage3

    original = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = original


@contextmanager
def _masters_shared() -> Iterator[None]:
    """Lets the weights that ZeRO-3's optimizer moves be the parameters themselves, which are fp32 already.

    DeepSpeed means to do so, but compares a device with the name of one, which are never equal. Left alone, a process
    holds 20 bytes for each parameter of its share instead of 16.
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
