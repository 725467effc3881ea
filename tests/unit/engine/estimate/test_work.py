"""What is counted of a model, against the formulas and the parts that count the same in other ways."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engine.estimate.layers import accelerator_kernels, activation_bytes, blank_states
from engine.estimate.live import live_peak
from engine.estimate.operations import Operation, OperationCounter
from engine.estimate.work import BlankGather, ModelWork, model_work
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.objectives.spread_keys import SpreadKeys

PLANS = Path(__file__).parents[4] / "configs" / "plans"
META = torch.device("meta")
FEW = ["model.vision_layers=2", "model.text_layers=1", "model.alignment_layers=1", "model.generation_layers=1"]


def _stage(plan: str, name: str, *overrides: str) -> tuple[StagePlan, Tokenizer]:
    read = load_plan(PLANS / plan, [f"stages.{name}.batch.micro_batch_size_per_gpu=4", *FEW, *overrides], 1)
    return read.stage(name), load_tokenizer(read.tokenizer)


def _flops(work: ModelWork) -> float:
    return sum(
        count * one.flops for each in work.passes for ops in (each.forward, each.backward) for one, count in ops.items()
    )


def test_operations_by_hand() -> None:
    with torch.device("meta"):
        x, weight = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(8, 6, dtype=torch.bfloat16)
        query = torch.zeros(2, 3, 16, 64, dtype=torch.bfloat16)
    with OperationCounter() as counter:
        (x @ weight.t()).relu().view(2, 16)
    product = Operation("product", "bf16", 2.0 * 4 * 6 * 8, 2.0 * (4 * 6 + 6 * 8 + 4 * 8), (1, 4, 8, 6))
    assert counter.found == {product: 1, Operation("other", "bf16", 0.0, 2.0 * 2 * 4 * 8): 1}
    with accelerator_kernels(), OperationCounter() as counter:
        F.scaled_dot_product_attention(query, query, query)
    (attention,) = counter.found
    assert attention.kind == "attention" and attention.flops == 4 * 2 * 3 * 16 * 16 * 64
    assert attention.shape == (16, 64)


def test_a_causal_query_looks_at_half_of_the_keys() -> None:
    query = torch.zeros(2, 3, 16, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    whole, half = OperationCounter(), OperationCounter()
    for counter, causal in ((whole, False), (half, True)):
        with accelerator_kernels(), counter:
            out = F.scaled_dot_product_attention(query, query, query, is_causal=causal)
            torch.autograd.backward([out], [torch.ones_like(out)])
    flops = [sorted(one.flops for one in counter.found if one.flops) for counter in (whole, half)]
    assert flops[0] == [2 * one for one in flops[1]] and len(flops[1]) == 2
    assert {one.shape for one in half.found if one.flops} == {(8, 64)}


def test_shapes_of_products_that_are_computed_together() -> None:
    with META:
        rows, bank = torch.zeros(60, 16, dtype=torch.bfloat16), torch.zeros(4, 16, 32, dtype=torch.bfloat16)
        ends = torch.zeros(4, dtype=torch.int32)
    with accelerator_kernels(), OperationCounter() as counter:
        torch._grouped_mm(rows, bank, offs=ends)
        torch._grouped_mm(rows.t(), torch.zeros(60, 32, dtype=torch.bfloat16, device="meta"), offs=ends)
        torch.bmm(bank.transpose(1, 2), bank)
    shapes = [one.shape for one in counter.found if one.kind == "product"]
    assert shapes == [(4, 15, 32, 16), (4, 16, 32, 15), (4, 32, 32, 16)]


def test_operations_are_those_that_mfu_counts() -> None:
    stage, tokenizer = _stage("emoji.yaml", "spatial")
    work = model_work(stage, tokenizer, 1, META)
    assert _flops(work) == pytest.approx(work.useful_flops * work.batch, rel=0.02)
    recomputed, _ = _stage("emoji.yaml", "spatial", "model.recompute=block")
    again = model_work(recomputed, tokenizer, 1, META)
    assert again.useful_flops == work.useful_flops
    # A third forward pass of all blocks, but for their last products, which no backward pass needs.
    assert 1.2 < _flops(again) / _flops(work) < 4 / 3
    assert sum(one.activations for one in again.passes) < 0.5 * sum(one.activations for one in work.passes)


def test_a_compiled_block_moves_less_for_the_same_products() -> None:
    stage, tokenizer = _stage("emoji.yaml", "spatial")
    compiled, _ = _stage("emoji.yaml", "spatial", "parallel.compile=true")
    eager, joined = (model_work(one, tokenizer, 1, META) for one in (stage, compiled))
    assert _flops(joined) == _flops(eager)

    def between(work: ModelWork, stack: str) -> tuple[float, float]:
        found = [
            (count, count * operation.bytes)
            for one in work.passes
            if one.layer.startswith(stack)
            for operations in (one.forward, one.backward)
            for operation, count in operations.items()
            if operation.kind == "other"
        ]
        return sum(count for count, _ in found), sum(moved for _, moved in found)

    (kernels, moved), (fewer, less) = between(eager, "visual_"), between(joined, "visual_")
    assert fewer < 0.6 * kernels and less < moved
    assert between(joined, "losses") == between(eager, "losses")  # blocks alone are compiled


def test_every_name_of_a_list_is_read_in_each_micro_batch() -> None:
    """As many texts as the list has, whatever the micro-batch: 1,599 of the drawings, and five."""
    data = "stages.spatial.data=[{source: emoji, kind: image_text, fields: [name]}]"
    read = []
    for names, size in (("[a, b, c, d, e]", 4), ("[a, b, c, d, e]", 8), ("emoji", 4)):
        objectives = f"stages.spatial.objectives=[{{kind: classify, names: {names}}}]"
        batch = f"stages.spatial.batch.micro_batch_size_per_gpu={size}"
        stage, tokenizer = _stage("emoji.yaml", "spatial", data, objectives, batch)
        work = model_work(stage, tokenizer, 1, META)
        assert _flops(work) == pytest.approx(work.useful_flops * work.batch, rel=0.02)
        (text,) = (one for one in work.passes if one.layer == "text_00")
        read.append((sum(count * one.flops for one, count in text.forward.items()), text.activations))
    assert read[1] == read[0]
    (flops, kept), (all_flops, all_kept) = read[0], read[2]
    assert all_flops / flops == pytest.approx(1599 / 5, rel=0.02)
    assert all_kept > 10 * kept  # with the block's weights, which are cast once, whatever the rows


def test_what_lives_when_the_forward_pass_ends_is_what_layers_keep() -> None:
    for recompute in ("none", "attention", "ffn", "block"):
        stage, tokenizer = _stage("emoji.yaml", "joint", f"model.recompute={recompute}")
        with META:
            chain = build_chain(stage.model, stage.objectives, tokenizer.special, compute_dtype=torch.bfloat16)
        for state in blank_states(stage, tokenizer, META):
            peak = live_peak(chain, state)
            kept = sum(activation_bytes(chain, [state]).values())
            # But for gaps between the cast weights, which are copied together from the second pass on.
            assert peak.forward == pytest.approx(kept, rel=5e-3)
            gradients = 4 * sum(one.numel() for one in chain.parameters() if one.requires_grad)
            assert peak.forward <= peak.alone <= peak.with_gradients <= peak.alone + gradients


def test_what_is_gathered_is_what_steps_read() -> None:
    """Two bytes of what is cast, four of tables and single vectors, nothing of decoders and temporal branches."""
    objectives = "stages.spatial.objectives=[{kind: univlc, queue_size: 64}]"
    sizes = {}
    for precision in ("fp32", "bf16"):
        stage, tokenizer = _stage("emoji.yaml", "spatial", objectives, f"parallel.precision={precision}")
        sizes[precision] = model_work(stage, tokenizer, 2, META).layers
    for name, size in sizes["bf16"].items():
        read = size.elements - size.unread
        assert sizes["fp32"][name].gathered == 4 * read
        assert 2 * read <= size.gathered <= 4 * read
        if size.elements:
            assert (read == 0) == name.startswith(("alignment_", "generation_"))
    block = sizes["bf16"]["visual_00"]
    assert 0.1 < block.unread / block.elements < 0.5
    assert block.gathered == 2 * (block.elements - block.unread)
    # Twins follow all that the stage trains but the temperature: nothing is rounded. Without twins all that is cast is.
    assert all(size.rounded == 0 for layers in sizes.values() for size in layers.values())
    alone = "stages.spatial.objectives=[{kind: univlc, queue_size: 0}]"
    stage, tokenizer = _stage("emoji.yaml", "spatial", alone, "parallel.precision=bf16")
    without = model_work(stage, tokenizer, 2, META).layers
    assert without["visual_00"].rounded == without["visual_00"].trained > 0
    assert 0 < without["embed"].rounded < 0.2 * without["embed"].trained
    embed = sizes["bf16"]["embed"]
    assert embed.gathered > 3.5 * (embed.elements - embed.unread)  # words are looked up as they are


def test_keys_of_other_replicas_and_their_gradients_are_counted() -> None:
    """By hand, with 4 pairs on each of 3 replicas, whose texts visit the pictures.

    Forward: fp32 embeddings of texts, identities, and 5 fp64 sums of each text. Backward: 3 fp32 figures of each text,
    gathered, which is half of summing as much, and gradients of the texts of all replicas.
    """
    objectives = "stages.spatial.objectives=[{kind: univlc, queue_size: 0, batch_keys: online}]"
    stage, tokenizer = _stage("emoji.yaml", "spatial", objectives)
    work = model_work(stage, tokenizer, 3, META)
    (losses,) = (one for one in work.passes if one.layer == "losses")
    embeddings = 4 * stage.model.projection_size * 4
    assert losses.joined == pytest.approx(embeddings + 4 * 8 + 4 * 5 * 8)
    assert losses.joined_gradient == 3 * (embeddings + 4 * 3 * 4 / 2)


def test_peak_by_hand() -> None:
    """The peak of a device that follows its allocations itself would be the same; here on the CPU's own kernels."""
    stage, tokenizer = _stage("emoji.yaml", "spatial", "parallel.precision=fp32")
    cpu = torch.device("cpu")
    chain = build_chain(stage.model, stage.objectives, tokenizer.special)
    (state, *_) = blank_states(stage, tokenizer, cpu)
    kept = sum(activation_bytes(chain, [state]).values())
    assert live_peak(chain, state).forward == pytest.approx(kept, rel=0.01)
    assert all(one.grad is None for one in chain.parameters())


def test_what_travels() -> None:
    ffn = "stages.spatial.model.ffn={kind: limoe, num_experts: 4, top_k: 1, every: 2, implementation: grouped}"
    stage, tokenizer = _stage("emoji.yaml", "spatial", ffn)
    work = model_work(stage, tokenizer, 3, META)
    joined = {one.layer: one.joined for one in work.passes}
    size, projected = work.batch, stage.model.projection_size
    # Embeddings of texts in fp32, an identity each, and 8 sums in fp64.
    assert joined["losses"] >= size * (4 * projected + 8 + 8 * 8) * (1 - 1e-9)
    routed = {one.layer: one for one in work.passes if one.routed}
    image = 1 + (stage.model.image_size // stage.model.patch_size) ** 2
    visual = routed["visual_01"]
    assert visual.routed >= size * image * stage.model.hidden_size * 2
    assert all(one.routed_gradient <= one.routed for one in routed.values())
    experts = work.layers["visual_01"]
    assert experts.experts == 4 * (2 * stage.model.hidden_size * stage.model.inner_size + stage.model.inner_size) + (
        4 * stage.model.hidden_size
    )
    assert experts.trained - experts.active == 0.75 * experts.experts


def test_what_a_ring_of_keys_sends() -> None:
    """Forward the keys go round once; backward they do again, and their gradients one hop more, back home."""
    gather, own, identity = BlankGather(4), torch.randn(8, 16), torch.arange(8)
    keys = SpreadKeys(own, identity, gather, ring=True)
    assert len(list(keys.blocks())) == 4
    assert (gather.joined, gather.gradient) == (own.nbytes + identity.nbytes, 0)
    gather.in_backward = True
    keys.sum_gradients(torch.zeros_like(block.keys) for block in keys.blocks())
    sent = 3 * (own.nbytes + identity.nbytes) + 4 * own.nbytes
    assert gather.joined == own.nbytes + identity.nbytes
    assert gather.gradient * 2 * 3 / 4 == pytest.approx(sent)  # what a ring sends for a sum of so many bytes
