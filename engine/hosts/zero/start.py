"""What DeepSpeed does at its start that a chain with equal values on all processes can do without.

It broadcasts every parameter by a collective of its own, and under ZeRO-3 gathers every trained one whole, only to hang
a hook on it: some 1,300 and 800 collectives for ``base``, each of which has to get round all processes. It imports
torch's compiler, 600 modules, for an optimizer that is not used here.

Source: DeepSpeed 0.19, ``runtime/engine.py``, ``runtime/zero/partition_parameters.py``, ``stage3.py`` and
    ``muon/original_muon.py``.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def import_without_compiler() -> None:
    """Imports DeepSpeed's Muon, which its engines look for, without compiling what nobody calls."""
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    compiled = compiler.compile
    vars(compiler)["compile"] = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        vars(compiler)["compile"] = compiled


@contextmanager
def already_equal() -> Iterator[None]:
    """Within the context engines are made, and parameters sharded, that are equal on all processes already."""
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    sharded = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    stage3 = importlib.import_module("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    hang = stage3.create_reduce_and_remove_grad_hooks

    def shard(init: Any, parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    def hang_on_blanks(optimizer: Any) -> None:
        trained = [one for group in optimizer.fp16_groups for one in group if one.requires_grad]
        gathers = [one.all_gather for one in trained]
        for one in trained:
            one.all_gather = _blank_of(one, sharded.ZeroParamStatus.AVAILABLE)
        try:
            hang(optimizer)
        finally:
            for one, gather in zip(trained, gathers, strict=True):
                one.all_gather = gather

    with ExitStack() as stack:
        for owner, name, ours in (
            (engine, "_broadcast_model", lambda engine: None),
            (sharded.Init, "_zero_init_param", shard),
            (stage3, "create_reduce_and_remove_grad_hooks", hang_on_blanks),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, ours)
        yield


def _blank_of(parameter: Any, available: Any) -> Any:
    """What stands in for a parameter's ``all_gather`` where only its shape is asked for."""

    def gather() -> None:
        parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.dtype, device=parameter.device)
        parameter.ds_status = available

    return gather
