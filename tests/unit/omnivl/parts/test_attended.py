"""Weights of attention, computed beside the forward pass: by hand, against kernels' outputs, and without a trace."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_chain import CONFIG, TOKENS, make_batch

from omnivl.architectures import OmniVL, Unified, ViLT
from omnivl.architectures.build import build_chain
from omnivl.inference.predict import predict
from omnivl.objectives import VQA
from omnivl.parts import decoder
from omnivl.parts.attended import Attended, attending, attends, attention_weights
from omnivl.parts.decoder import GroundedBlock
from omnivl.parts.padding import Padding
from omnivl.parts.sizes import Transformer, Words
from omnivl.parts.streams import Part, Stream
from omnivl.parts.unified import UnifiedBlock

SIZES = Transformer(hidden_size=8, num_heads=2, layers=1)
VILT = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=2),
    words=Words(length=8, vocab_size=50),
    image_size=16,
    patch_size=8,
)


def test_two_keys_by_hand() -> None:
    # One head of size 4, so the scale is 1/2. The query (2 ln 3, 0, 0, 0) has scores ln 3 and 0 with the keys
    # (1, 0, 0, 0) and 0: weights 3/4 and 1/4.
    q, k = torch.tensor([[[2 * math.log(3), 0.0, 0.0, 0.0]]]), torch.eye(4)[None, :2] * torch.tensor([[1.0], [0.0]])
    torch.testing.assert_close(attention_weights(q, k, 1), torch.tensor([[[0.75, 0.25]]]))
    only_second = torch.tensor([[False, True]])
    torch.testing.assert_close(attention_weights(q, k, 1, only_second), torch.tensor([[[0.0, 1.0]]]))
    # Two heads of size 2: the first one's scale is 1 / sqrt(2), its scores are sqrt(2) ln 3 and 0; the second one sees
    # equal keys. The mean of 3^sqrt(2) / (3^sqrt(2) + 1) and 1/2.
    first = 3 ** math.sqrt(2) / (3 ** math.sqrt(2) + 1)
    wanted = torch.tensor([[[(first + 0.5) / 2, (1.5 - first) / 2]]])
    torch.testing.assert_close(attention_weights(q, k, 2), wanted)


def grounded(x: torch.Tensor, mask: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, Attended]:
    torch.manual_seed(0)
    block = GroundedBlock(SIZES, causal=False).eval()
    with torch.no_grad(), attending({"alignment_00": block}) as heard:
        out = block(x, mask, memory, None)
    (one,) = heard
    return out.y, one


def test_weights_are_those_that_the_kernel_used() -> None:
    """With one head the weights times the values are what the cross-attention returned, row by row of the memory."""
    draw = torch.Generator().manual_seed(1)
    x, memory = torch.randn(3, 4, 8, generator=draw), torch.randn(2, 5, 8, generator=draw)
    rows, seen = torch.tensor([1, 0, 1]), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    torch.manual_seed(0)
    block = GroundedBlock(replace(SIZES, num_heads=1), causal=False).eval()
    made = []
    block.cross.out.register_forward_pre_hook(lambda _, given: made.append(given[0]))
    with torch.no_grad(), attending({"a": block}) as heard:
        block(x, torch.ones(3, 4, dtype=torch.bool), memory, rows, seen)
        values = block.cross.project(memory)[..., 8:][rows]
    (one,) = heard
    assert (one.layer, one.num_heads) == ("a", 1)
    torch.testing.assert_close(one.weights @ values, made[0])
    torch.testing.assert_close(one.weights.sum(-1), torch.ones(3, 4))
    assert (one.weights[~seen[rows][:, None].expand(-1, 4, -1)] == 0).all()
    assert (one.weights[seen[rows][:, None].expand(-1, 4, -1)] > 0).all()


def test_words_that_are_left_out_as_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    x, memory = torch.randn(2, 4, 8, generator=draw), torch.randn(2, 5, 8, generator=draw)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    assert Padding.worth_dropping(mask) is not None
    dropped, left_out = grounded(x, mask, memory)
    monkeypatch.setattr(decoder.Padding, "worth_dropping", lambda mask, kept=None: None)
    whole, computed = grounded(x, mask, memory)
    torch.testing.assert_close(left_out.weights[mask], computed.weights[mask])
    torch.testing.assert_close(dropped[mask], whole[mask])


def test_joined_rows_leave_a_part_to_the_words() -> None:
    """Of one row by hand: the softmax over words and patches alike, of which the patches' part is kept."""
    torch.manual_seed(0)
    block = UnifiedBlock(SIZES, 0).eval()
    x = torch.randn(2, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2], mask[1, 6] = False, False  # a word and a patch that are padding
    stream = Stream(x, (Part("text", 3), Part("image", 4)), mask)
    assert stream.without_padding().padding is not None, "on a CPU they are left out"
    alone = Stream(x[:, :3], (Part("text", 3),), mask[:, :3])
    with torch.no_grad(), attending({"unified_00": block}) as heard:
        block(stream)
        block(alone)
        q, k, _ = block.qkv(block.norm1(x, stream), stream).chunk(3, dim=-1)
    (one, again) = heard
    assert torch.equal(one.weights[mask[:, :3]], again.weights[mask[:, :3]]), "the last line calls it once more"
    whole = torch.zeros(2, 3, 7)
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[:, :3, head] @ k[..., head].transpose(1, 2) / 2
        whole += scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) / 2
    torch.testing.assert_close(one.weights[mask[:, :3]], whole[:, :, 3:][mask[:, :3]])
    assert (one.weights[1, :, 3] == 0).all() and (one.weights.sum(-1) < 1).all()


@pytest.mark.parametrize("model", [CONFIG, Unified.like(CONFIG), VILT], ids=lambda one: one.kind)
@pytest.mark.parametrize("compiled", [False, True])
def test_listening_changes_no_result_and_leaves_nothing_behind(model: OmniVL | Unified | ViLT, compiled: bool) -> None:
    """Also of blocks that are compiled, which call no hooks that they were compiled without."""
    torch.manual_seed(0)
    chain = build_chain(model, (VQA(answers=("a", "b", "c")),), TOKENS).eval()
    batch = make_batch("image_text", ())
    assert batch.token_ids is not None
    blocks = {name: layer.block for name, layer in chain.named_layers.items() if attends(getattr(layer, "block", None))}
    with torch.no_grad():
        plain = predict(chain, "vqa", batch.frames, batch.token_ids)
        if compiled:
            for layer in chain.layers:
                if hasattr(layer, "compile_blocks"):
                    layer.compile_blocks(backend="eager")
            before = predict(chain, "vqa", batch.frames, batch.token_ids)
            torch.testing.assert_close(before, plain)
        with attending(blocks) as heard:
            listened = predict(chain, "vqa", batch.frames, batch.token_ids)
        after = predict(chain, "vqa", batch.frames, batch.token_ids)
    assert torch.equal(listened, plain)
    torch.testing.assert_close(after, plain)
    assert {one.layer for one in heard} == {name for name in blocks if not name.startswith("generation")}
    assert not any(one._forward_hooks for block in blocks.values() for one in block.modules())
    positions = 1 + (16 // model.inputs.patch_size) ** 2
    assert {one.weights.shape for one in heard} == {(4, 8, positions)}


def test_hooks_are_taken_off_after_an_error() -> None:
    block = GroundedBlock(SIZES, causal=False)
    listening = attending({"a": block})
    listening.__enter__()
    assert block.cross._forward_hooks
    assert not listening.__exit__(KeyError, KeyError(), None)
    assert not block.cross._forward_hooks
