"""Text blocks that see in both directions or back only."""

from dataclasses import replace

import pytest
import torch

from omnivl.chain.state import State, StepLayout
from omnivl.parts.bert import BertBlock, TextBlock
from omnivl.parts.embed import TextEmbedding
from omnivl.parts.sizes import Transformer, Words

SIZES = Transformer(hidden_size=8, num_heads=2, layers=1)
MASK = torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_block_sees_no_later_position(padded: bool) -> None:
    torch.manual_seed(0)
    mask = MASK.clone()
    mask[0, 4] = not padded
    causal, both = BertBlock(SIZES, causal=True), BertBlock(SIZES)
    both.load_state_dict(causal.state_dict())
    x = torch.randn(3, 5, 8)
    changed = torch.cat([x[:, :3], torch.randn(3, 2, 8)], dim=1)
    torch.testing.assert_close(causal(x, mask).y[:, :3], causal(changed, mask).y[:, :3])
    assert (both(x, mask).y - both(changed, mask).y)[:, :3].abs().max() > 1e-3
    # The last position sees all of them either way.
    torch.testing.assert_close(causal(x, MASK).y[:, -1], both(x, MASK).y[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_of_a_causal_block_sees_the_padding_at_its_end(dtype: torch.dtype) -> None:
    """Also where padding is computed and attended to, as on an accelerator."""
    torch.manual_seed(0)
    block, x = BertBlock(SIZES, causal=True), torch.randn(3, 5, 8).to(dtype)
    mask = MASK.clone()
    mask[0, 3:] = mask[1, 4:] = False
    assert torch.equal(block.attend(block.norm1, x, mask, None)[0], block.attend(block.norm1, x, MASK, None)[0])
    masked = block.attention(block.enter(block.norm1, x), mask, True, None)
    assert torch.equal(block.attend(block.norm1, x, mask, None)[0][mask], masked[mask])


def test_the_last_causal_block_keeps_all_positions() -> None:
    layout = StepLayout("image_text", 3, 1, text={"clean": slice(0, 3)}, class_only=True)
    state = State({"text": torch.randn(3, 5, 8), "text_mask": MASK}, layout)
    assert TextBlock(0, SIZES, 5)(state)["text"].shape == (3, 1, 8)
    assert TextBlock(0, SIZES, 5, causal=True)(state)["text"].shape == (3, 5, 8)


def test_embeddings_without_a_norm_are_the_sum_of_both_tables() -> None:
    embedding = TextEmbedding(Words(length=5, vocab_size=7, norm_embeddings=False), replace(SIZES, dropout=0.0))
    ids = torch.tensor([[3, 1]])
    wanted = embedding.words[[3, 1]] + embedding.positions[:2]
    torch.testing.assert_close(embedding(ids, torch.float32), wanted[None])
