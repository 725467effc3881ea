"""Builds a chain under ZeRO-3 without any process ever holding more than one whole layer of it."""

from collections.abc import Callable
from typing import Any

import torch

from engine.hosts.zero.engine import import_deepspeed, offload_config
from engine.hosts.zero.experts import ExpertParallel
from engine.hosts.zero.start import already_equal
from engine.plan.parallel import Offloading
from engine.processes.collectives import broadcast_together
from omnivl.chain.chain import ChainLayer


class ZeroBuild:
    """Shards the layers of a chain as they are built, so that each process keeps its share of them.

    The starting values are those of a chain that is built whole: process 0 builds all layers in the same order and from
    the same random numbers. Every process frees the other processes' shares of a layer before it builds the next one.

    Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3; ``deepspeed.zero.Init``.
    Differs: ``zero.Init`` as a context shards every module when its constructor returns, while other modules still read
        or change its parameters (twins copy them, projections are scaled). Here a layer is sharded when it is complete.
    """

    def __init__(self, experts_over: Callable[[ChainLayer], int], offload: Offloading, device: torch.device) -> None:
        """Prepares DeepSpeed. Called by every process; the default process group has to exist.

        Args:
            experts_over: Processes over which a layer's bank of sparse experts is split; 1 for none.
            offload: What is offloaded.
            device: Where the chain is to run.
        """
        import_deepspeed(device)
        self._device, self._experts_over = device, experts_over
        self._config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's parser requires it; the engine has its own
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **offload_config(offload)},
        }
        self._cut: Any = None

    def shard(self, layer: ChainLayer) -> None:
        """Shards a layer. Called by every process, with layers of equal shapes.

        Args:
            layer: Whole. Process 0's parameters and buffers become everyone's.

        Raises:
            PlanError: A bank of experts cannot be split over so many processes.
        """
        import deepspeed

        layer.to(self._device)
        broadcast_together(layer.state_dict().values())
        ExpertParallel(self._experts_over(layer)).cut(layer)
        parameters = list(layer.parameters())
        with already_equal():
            if self._cut is not None:
                self._cut(param_list=parameters)
            elif parameters:
                deepspeed.zero.Init(module=layer, config_dict_or_path=self._config, dtype=torch.float32)
                self._cut = parameters[0].convert_to_zero_parameters  # type: ignore[attr-defined]
