"""Sparse feed-forward layers against a dense one and against DeepSpeed's, forward and backward.

python -m benchmarks.experts

4,096 tokens (on a GPU 65,536), 384 -> 1,536 -> 384, one expert per token, weights and activations in bf16, so that
every layer multiplies as much as the dense one. ``omnivl`` is the layer as plans have it, with its router and what its
losses are made of; ``loop`` and ``grouped`` are its other implementations. DeepSpeed's ``MoE`` is the faster of its
capacity factor of 1.25 and its dropless form. Routers start at random, so that experts get unequal numbers of tokens.
Memory is that of the tensors that autograd keeps for the backward pass, without weights.

ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 limits a CPU with AMX to the instructions of one without.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, Step, over, rates, take_turns
from benchmarks.record import Options, Report, Table, main_of
from moe.config import LIMoEConfig
from moe.dense import DenseFeedForward
from moe.experts.products import Implementation
from moe.sparse import SparseFeedForward
from moe.tokens import Tokens

HIDDEN, INNER = 384, 1536
EXPERTS = (8, 32, 64)
OF_DENSE: Mapping[str, Mapping[int, float]] = {"cpu": {8: 0.9, 32: 0.7, 64: 0.55}, "cuda": {64: 0.85}}
OF_DEEPSPEED: Mapping[str, Mapping[int, float]] = {"cpu": {8: 1.15, 32: 1.3, 64: 1.3}, "cuda": {}}
"""Least speed over the dense layer and over DeepSpeed's, by type of device and number of experts."""


class DenseLayer(nn.Module):
    """The dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = DenseFeedForward(HIDDEN, INNER)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output, and no auxiliary loss."""
        return self.ffn(x).y, None


class SparseLayer(nn.Module):
    """Our layer and a stand-in for its losses, so that they have a gradient."""

    def __init__(self, num_experts: int, implementation: Implementation) -> None:
        super().__init__()
        config = LIMoEConfig(num_experts=num_experts, every=1, implementation=implementation)
        self.ffn = SparseFeedForward(config, HIDDEN, INNER, ("image", "text"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and a scalar of the router's sums."""
        out = self.ffn(x, Tokens.of("image", x))
        assert out.router_sums is not None
        return out.y, out.router_sums.sum() * 1e-6


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's layer around the same perceptron."""

    def __init__(self, num_experts: int, dropless: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))
        self.ffn = MoE(HIDDEN, expert, num_experts, capacity_factor=1.25, drop_tokens=not dropless, min_capacity=4)
        self.ffn.set_deepspeed_parallelism()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and the load-balancing loss."""
        y, loss, _ = self.ffn(x)
        return y, loss


def step_of(layer: nn.Module, x: Tensor, upstream: Tensor) -> Step:
    """Forward and backward, gradients of input and weights."""
    layer.to(device=x.device, dtype=x.dtype).train()

    def step() -> None:
        leaf = x.clone().requires_grad_()
        y, loss = layer(leaf)
        torch.autograd.backward([y] if loss is None else [y, loss], [upstream] if loss is None else [upstream, None])
        layer.zero_grad(set_to_none=True)

    return step


def kept_mebibytes(layer: nn.Module, x: Tensor) -> float:
    """MiB of tensors that autograd keeps between forward and backward, weights left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = layer(x.clone().requires_grad_())
    del kept
    return sum(found.values()) / 2**20


def start_deepspeed() -> None:
    """A process group of one process, which DeepSpeed's layer needs."""
    import deepspeed

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.comm.torch.build_shm_op = lambda: None  # compiling it takes a minute, and one process does not use it
    deepspeed.init_distributed(dist_backend="gloo" if not torch.cuda.is_available() else "nccl", verbose=False)


def run(options: Options) -> Report:
    """Lets all layers of one number of experts take turns."""
    start_deepspeed()
    tokens = 1024 if options.quick else 65_536 if options.device.type == "cuda" else 4096
    rounds = 2 if options.quick else 11
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(tokens, HIDDEN, generator=draw).to(options.device, torch.bfloat16) for _ in range(2))
    ratios: list[Ratio] = []
    tables: list[Table] = []
    for experts in EXPERTS[:1] if options.quick else EXPERTS:
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "dense": DenseLayer(),
            "omnivl": SparseLayer(experts, "auto"),
            "omnivl, loop": SparseLayer(experts, "loop"),
            "omnivl, grouped": SparseLayer(experts, "grouped"),
            "deepspeed, capacity 1.25": DeepSpeedLayer(experts, dropless=False),
            "deepspeed, dropless": DeepSpeedLayer(experts, dropless=True),
        }
        steps = {name: step_of(layer, x, upstream) for name, layer in layers.items()}
        seconds = take_turns(steps, rounds, options.device, warmup=2)
        ratios += _ratios(experts, seconds, options.device.type)
        rows = [
            [name, str(rates(tokens, taken)), f"{kept_mebibytes(layers[name], x):.0f}"]
            for name, taken in seconds.items()
        ]
        tables.append(Table(f"{experts} experts", ("layer", "tokens per second", "MiB kept for backward"), rows))
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    settings: dict[str, Any] = {"tokens": tokens, "hidden": HIDDEN, "inner": INNER, "top_k": 1, "rounds": rounds}
    if isa := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        settings["instructions of the CPU at most"] = isa
    return Report("experts", what, ratios, tables, settings)


def _ratios(experts: int, seconds: Mapping[str, list[float]], device: str) -> list[Ratio]:
    peer = min((name for name in seconds if name.startswith("deepspeed")), key=lambda name: sorted(seconds[name])[0])
    mine = seconds["omnivl"]
    dense = f"{experts} experts: speed of omnivl / of the dense layer"
    deepspeed = f"{experts} experts: speed of omnivl / of {peer}"
    return [
        Ratio(dense, over(seconds["dense"], mine), at_least=OF_DENSE[device].get(experts)),
        Ratio(deepspeed, over(seconds[peer], mine), at_least=OF_DEEPSPEED[device].get(experts)),
        Ratio(f"{experts} experts: speed of omnivl / of its loop", over(seconds["omnivl, loop"], mine)),
        Ratio(f"{experts} experts: speed of omnivl / of its grouped product", over(seconds["omnivl, grouped"], mine)),
    ]


if __name__ == "__main__":
    main_of("experts", __doc__, run)
