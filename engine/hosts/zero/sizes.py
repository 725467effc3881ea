"""How much ZeRO gathers, reduces and steps at a time, from the sizes of the layers of a chain.

DeepSpeed's defaults are for models of tens of billions of parameters: a bucket of 5e8 elements, and 1e9 that stay
gathered between forward and backward pass, which is more than all of most models here.

Source: https://www.deepspeed.ai/docs/config-json, "ZeRO Optimizations for FP16 Training". What each figure does:
    ``deepspeed/runtime/zero/partitioned_param_coordinator.py`` and ``stage3.py``.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.step.muon import STEP_COPIES
from engine.step.whole import whole_numel

_LEAST = 2**22
"""Elements of the smallest bucket: 16 MiB. Smaller collectives cost little but their latency."""

_MOST = 50_000_000
"""Elements of a bucket above which a collective is no faster: 200 MB."""

BUFFERS = 8
"""Buffers at most into which stage 1 copies a group's gradients: in each, every replica's part begins a new piece."""


@dataclass(frozen=True)
class ZeroSizes:
    """Sizes in elements, all fp32.

    Attributes:
        bucket: Gradients that are reduced by one collective, parameters that stages 1 and 2 gather by one, and the part
            of the optimizer that stage 3 steps at a time: those of the layer that trains most. A layer's gradients
            arrive together; stage 3 holds the bucket beside them, and while it steps copies this many elements of its
            share. An even number, as DeepSpeed requires.
        prefetch: Parameters that stage 3 gathers ahead of their use: the largest layer, so that one layer is on its way
            while another computes.
        live: Whole parameters from which on stage 3 does not gather ahead: the layer that computes, the one that was
            gathered ahead, and the one that is being released.
        reuse: A parameter that is used again within so many parameters is not released: the largest layer, so that the
            last layers of the forward pass stay for the beginning of the backward pass.
    """

    bucket: int
    prefetch: int
    live: int
    reuse: int

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> "ZeroSizes":
        """The sizes for a chain.

        Args:
            layers: The chain's, whole or sharded; their trained parameters marked as such.
        """
        trained = [sum(whole_numel(p) for p in layer.parameters() if p.requires_grad) for layer in layers]
        largest = max(sum(map(whole_numel, layer.parameters())) for layer in layers)
        bucket = min(max(max(trained), _LEAST), _MOST, max(sum(trained), 1))
        prefetch = min(max(largest, _LEAST), _MOST)
        return cls(bucket + bucket % 2, prefetch, live=2 * max(largest, _LEAST) + prefetch, reuse=max(largest, _LEAST))

    @staticmethod
    def share_bytes(layers: Sequence[nn.Module], processes: int, matrices: Collection[int] = ()) -> int:
        """Bytes of a chain that a process holds permanently under stage 3, without offloading: its share.

        16 bytes of each trained parameter (it, its gradient, AdamW's two moments, all fp32), 12 where Muon moves it,
        which has one moment; of each other one 4, or 2 where it is kept in bf16.

        Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3.1, with fp32 parameters, their own masters.

        Args:
            layers: The chain's; their trained parameters marked as such.
            processes: Over which they are sharded.
            matrices: Ids of the parameters that Muon moves where they are trained.
        """
        every = [parameter for layer in layers for parameter in layer.parameters()]
        trained = {id(one): 12 if id(one) in matrices else 16 for one in every if one.requires_grad}
        return sum(trained.get(id(one), one.element_size()) * whole_numel(one) for one in every) // processes

    def transient_bytes(self, matrices: int = 0) -> int:
        """Bytes that a process holds temporarily, without activations.

        Beside the bucket of gradients these are whole layers in the passes, and copies in a step of Muon.

        Args:
            matrices: Elements of its share that Muon moves.
        """
        return 4 * (self.bucket + max(self.live, STEP_COPIES * min(matrices, self.bucket)))

    def as_config(self, stage: int) -> dict[str, Any]:
        """The fields of DeepSpeed's section ``zero_optimization``."""
        if stage < 3:
            return {"reduce_bucket_size": self.bucket, "allgather_bucket_size": self.bucket}
        return {
            "reduce_bucket_size": self.bucket,
            "sub_group_size": self.bucket,
            "stage3_prefetch_bucket_size": self.prefetch,
            "stage3_max_live_parameters": self.live,
            "stage3_max_reuse_distance": self.reuse,
        }
