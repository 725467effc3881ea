"""What is recomputed changes neither losses nor gradients, and what is kept for the backward pass by known amounts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.config import DenseConfig, LIMoEConfig, MoMEConfig
from moe.routers import NoisyRouterLossConfig, TokenChoice
from omnivl.architectures import OmniVL, Unified
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import UniVLC

TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=40, num_reserved=5)
OBJECTIVES = (UniVLC(),)
CONFIG = OmniVL(
    **{"hidden_size": 32, "num_heads": 4, "projection_size": 8, "momentum": None, "dropout": 0.1, "drop_path": 0.2},
    **{"vision_layers": 2, "text_layers": 2, "alignment_layers": 1, "generation_layers": 1},
    **{"image_size": 16, "video_size": 16, "patch_size": 4, "num_frames": 2, "text_length": 6, "vocab_size": 40},
)
NOISY = LIMoEConfig(
    num_experts=4, every=1, router=TokenChoice(top_k=2, noise=1.0, losses=NoisyRouterLossConfig(load=0.0))
)
ROWS, POSITIONS = 3, 17  # of the visual stream of an image


def make(dtype: torch.dtype = torch.float32, **fields: Any) -> Chain:
    torch.manual_seed(0)
    config = Unified.like(CONFIG) if "multiway" in fields else CONFIG
    return build_chain(replace(config, **fields), OBJECTIVES, TOKENS, compute_dtype=dtype).train()


def first_state(kind: DataKind) -> State:
    draw = torch.Generator().manual_seed(0)
    frames = 2 if kind.startswith("video") else 1
    batch = Batch(
        kind,
        torch.randint(0, 256, (ROWS, frames, 3, 16, 16), generator=draw, dtype=torch.uint8),
        torch.randint(5, 40, (ROWS, 6), generator=draw),
        *(torch.arange(ROWS) for _ in range(3)),
    )
    return State.from_batch(batch, plan_layout(OBJECTIVES, kind, ROWS, frames))


def step(chain: Chain, kind: DataKind) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = chain(first_state(kind))["loss"]
    loss.backward()
    return loss, {name: one.grad for name, one in chain.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("recompute", ["attention", "ffn", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize(
    "fields",
    [
        {"ffn": DenseConfig()},
        {"ffn": NOISY, "recompute_every": 2},
        {"ffn": MoMEConfig(), "multiway": True},
    ],
    ids=["dense", "noisy experts", "unified"],
)
def test_the_step_is_the_same_bit_for_bit(fields: Any, kind: Any, dtype: Any, recompute: str) -> None:
    wanted, gradients = step(make(dtype, **fields), kind)
    loss, found = step(make(dtype, **fields, recompute=recompute), kind)
    assert torch.equal(loss, wanted)
    assert found.keys() == gradients.keys()
    assert [name for name in gradients if not torch.equal(found[name], gradients[name])] == []


@contextmanager
def kept_bytes(chain: Chain) -> Iterator[list[int]]:
    """Bytes of the storages that the graph keeps, parameters aside, each once; in a list of one."""
    own = {parameter.untyped_storage().data_ptr() for parameter in chain.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage  # held, so that no other storage takes its place
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def kept(**fields: Any) -> int:
    """Of the first two visual blocks of an image, in bf16. The last one may attend from the class token alone."""
    chain = make(torch.bfloat16, dropout=0.0, drop_path=0.0, vision_layers=3, **fields)
    state = chain.get_submodule("embed")(first_state("image_text"))
    with kept_bytes(chain) as total:
        for name in ("visual_00", "visual_01"):
            state = chain.get_submodule(name)(state)
    return total[0]


def test_bytes_that_are_kept() -> None:
    per_block = kept() / 2
    # The explicit products keep queries, keys and values by head and the attention [R, H, S, S]; recomputed, queries,
    # keys and values as they left the projection.
    attention = 2 * ROWS * 4 * POSITIONS**2
    assert kept(recompute="attention") == kept() - 2 * attention
    assert kept(recompute="attention", recompute_every=2) == kept() - attention
    # A perceptron keeps its two inner activations and a copy of each of its matrices.
    inner = 2 * (2 * ROWS * POSITIONS * 128 + 2 * 32 * 128)
    assert kept(recompute="ffn") == kept() - 2 * inner
    # A block keeps what goes into it.
    assert kept(recompute="block") <= 2 * 2 * ROWS * POSITIONS * 32
    assert kept(recompute="block", recompute_every=2) == pytest.approx(
        per_block + kept(recompute="block") / 2, rel=0.01
    )
