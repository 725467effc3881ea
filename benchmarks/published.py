"""Estimates against published figures of other engines, whose models are counted by their classes of ``transformers``.

python -m benchmarks.published            # prints the table of docs/estimate.md
python -m benchmarks.published --write    # puts it there

No run of these engines is repeated: the estimate is that of this engine's hosts for the same matrices, batch and
machines, with the figures of ``configs/hardware`` as they stand. Batches and machines of open_clip, torchtitan
and llm-foundry are recalled; those of KempnerForge and NeMo Automodel are read in their reports.

Sources: github.com/KempnerInstitute/KempnerForge, benchmarks/mfu_scaling, report of 2026-04-05;
    github.com/NVIDIA-NeMo/Automodel, docs/performance-summary.md of 2025-10-02 and examples/benchmark/configs.
"""

import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, OPTConfig, ViTConfig, ViTModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from engine.estimate.hardware import load_hardware
from engine.estimate.layers import accelerator_kernels
from engine.estimate.live import LivePeak
from engine.estimate.operations import OperationCounter, Operations
from engine.estimate.step import StepEstimate, estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.work import LayerSize, ModelWork, Pass
from engine.hosts.zero.sizes import ZeroSizes
from engine.plan.parallel import BatchConfig, HostName, ParallelConfig
from engine.plan.plan import StagePlan

PAGE = Path(__file__).parents[1] / "docs" / "estimate.md"
_FP32_OF_BF16 = 2  # two bf16 numbers count as one of the four-byte elements of layer sizes


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: Model, machines, batch.
        figure: What is compared.
        published: Lowest and highest published value.
        estimated: The estimate.
        note: What the estimate does not take into account.
        is_run: Whether somebody trained so; otherwise operations alone are counted.
    """

    what: str
    figure: str
    published: tuple[float, float]
    estimated: float
    note: str
    is_run: bool = True

    @property
    def error(self) -> float:
        """Against the nearest published value; 0 within their range."""
        low, high = self.published
        nearest = min(max(self.estimated, low), high)
        return self.estimated / nearest - 1


def counted(
    name: str,
    module: nn.Module,
    run: Callable[[], Tensor],
    share: int = 1,
    *,
    causal: bool = False,
    recomputed: bool = False,
) -> tuple[Pass, LayerSize, float]:
    """What a module does forward and backward, its size, and its useful operations.

    Args:
        name: Of the layer.
        module: On ``meta``.
        run: Its forward pass.
        share: Divisor of the number of parameters: how many of them take four bytes together.
        causal: Whether its attention is: the kernel leaves out half of what counts as useful.
        recomputed: Whether the backward pass runs the forward pass again.
    """
    forward, backward = OperationCounter(), OperationCounter()
    with accelerator_kernels():
        with forward:
            out = run()
        ones = torch.ones_like(out)
        with backward:
            torch.autograd.backward([out], [ones])
    elements = sum(one.numel() for one in module.parameters()) // share
    useful = sum(
        count * one.flops * (2 if causal and one.kind == "attention" else 1) for one, count in forward.found.items()
    )
    done, undone = forward.found, backward.found
    again = Counter(undone) + Counter(done) if recomputed else undone
    made = Pass(name, done, again, *(0.0,) * 7, 0)
    return made, LayerSize(elements, 0, 0, 0, 0, elements, 0), 3 * useful


def step_of(
    layers: Sequence[tuple[Pass, LayerSize, float]],
    cluster: Cluster,
    batch: int,
    host: HostName,
    zero: int,
    *,
    accumulated: int = 1,
    experts_over: int = 1,
) -> tuple[StepEstimate, float]:
    """A step of counted layers, and its MFU.

    Args:
        layers: With what they do in one micro-batch.
        cluster: Where.
        batch: Samples of a micro-batch.
        host: Of the run.
        zero: 3 or 1.
        accumulated: Micro-batches of a step.
        experts_over: Processes over which experts are split.
    """
    passes = [one for one, _, _ in layers]
    sizes = {one.layer: size for one, size, _ in layers}
    flops = sum(useful for _, _, useful in layers)
    work = ModelWork(
        tuple(passes), sizes, batch, ZeroSizes(50_000_000, 1, 1, 1), (LivePeak(0, 0, 0),), flops / batch, 1.0
    )
    parallel = ParallelConfig(host=host, zero_stage=3 if zero == 3 else 1)
    batches = BatchConfig(micro_batch_size_per_gpu=batch, gradient_accumulation_steps=accumulated)
    stage = StagePlan("published", 1, (), (), parallel=parallel, batch=batches)
    step = estimate_step(stage, work, cluster, expert_parallel=experts_over)
    return step, accumulated * flops / (step.seconds * cluster.hardware.peak_flops("bf16"))


def clip(name: str, size: str, patch: int, batch: int, nodes: int, published: float) -> Row:
    """A CLIP of open_clip on LAION-400M, A100: images per second and GPU."""
    wide = size == "L"
    vision = {"hidden_size": 1024 if wide else 768, "num_hidden_layers": 24 if wide else 12, "patch_size": patch}
    vision |= {"num_attention_heads": 16 if wide else 12, "intermediate_size": 4096 if wide else 3072}
    words = {"hidden_size": 768 if wide else 512, "num_attention_heads": 12 if wide else 8}
    words |= {"intermediate_size": 3072 if wide else 2048}
    with torch.device("meta"):
        config = CLIPConfig(text_config=words, vision_config=vision, projection_dim=words["hidden_size"])
        model = CLIPModel(config).bfloat16()
        pixels = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16)
        ids = torch.zeros(batch, 77, dtype=torch.int64)
    layer = counted("clip", model, lambda: model(input_ids=ids, pixel_values=pixels).logits_per_image)
    step, _ = step_of([layer], Cluster(load_hardware("a100"), nodes, 8), batch, "plain", 0)
    note = "no data loading, no gathering of features; it trained end to end"
    return Row(
        f"open_clip {name}, {8 * nodes} A100, {batch} a GPU",
        "images/s a GPU",
        (published,) * 2,
        batch / step.seconds,
        note,
    )


def llama(nodes: int, published: tuple[float, float]) -> Row:
    """Llama-8B of torchtitan, FSDP in bf16, 8,192 tokens a GPU."""
    fields: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 32, "attn_implementation": "sdpa"}
    config = LlamaConfig(**fields)
    with torch.device("meta"):
        block, x = LlamaDecoderLayer(config, 0).to(torch.bfloat16), torch.zeros(1, 8192, 4096, dtype=torch.bfloat16)
        head = nn.Linear(4096, 128256, bias=False, dtype=torch.bfloat16)
        angles = torch.zeros(1, 8192, 128, dtype=torch.bfloat16)
    x.requires_grad_()
    run = counted("0", block, lambda: block(x, position_embeddings=(angles, angles)), _FP32_OF_BF16, causal=True)
    layers = [*_repeated(run, 32), counted("head", head, lambda: head(x).float(), _FP32_OF_BF16)]
    _, mfu = step_of(layers, Cluster(load_hardware("h100"), nodes, 8), 1, "zero", 3)
    return Row(
        "torchtitan Llama-8B, 8 H100, 8,192 tokens a GPU", "MFU, %", published, 100 * mfu, "nothing is recomputed"
    )


def kempner(
    name: str, width: int, depth: int, gpus: int, nodes: int, batches: tuple[int, int], mfu: float, note: str
) -> Row:
    """A Llama of KempnerForge on H200 in nodes of four, FSDP in bf16, 4,096 tokens a row, all blocks recomputed."""
    batch, accumulated = batches
    heads, multiple = width // 128, 256
    inner = multiple * -(-int(1.3 * int(2 * 4 * width / 3)) // multiple)  # Llama's rule for its inner size
    fields: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    fields |= {"num_key_value_heads": 8, "vocab_size": 128256, "attn_implementation": "sdpa"}
    config = LlamaConfig(**fields)
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
        x = torch.zeros(batch, 4096, width, dtype=torch.bfloat16)
        head = nn.Linear(width, 128256, bias=False, dtype=torch.bfloat16)
        angles = torch.zeros(1, 4096, 128, dtype=torch.bfloat16)
    x.requires_grad_()
    run = counted(
        "0", block, lambda: block(x, position_embeddings=(angles, angles)), _FP32_OF_BF16, causal=True, recomputed=True
    )
    layers = [*_repeated(run, depth), counted("head", head, lambda: head(x).float(), _FP32_OF_BF16)]
    cluster = Cluster(load_hardware("h200"), nodes, gpus // nodes)
    _, found = step_of(layers, cluster, batch, "zero" if gpus > 1 else "plain", 3, accumulated=accumulated)
    what = f"KempnerForge Llama {name}, {gpus} H200, {batch} x 4,096 tokens a GPU, x {accumulated}"
    return Row(what, "MFU, %", (mfu, mfu), 100 * found, note)


class RoutedBlock(nn.Module):
    """A decoder block of a language model with routed experts, as one process of expert parallelism computes it.

    As many rows come to its own experts as it sends away: routing is balanced.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_size: int, inner: int, experts: int, own: int):
        super().__init__()
        self.heads, self.kv_heads, self.inner = heads, kv_heads, inner
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.q, self.kv = (nn.Linear(width, count * head_size, bias=False) for count in (heads, 2 * kv_heads))
        self.out, self.router = nn.Linear(heads * head_size, width, bias=False), nn.Linear(width, experts, bias=False)
        # One product stands for those of all own experts, which a grouped kernel does in one call.
        self.up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.own = own

    def forward(self, x: Tensor, top_k: int) -> Tensor:
        """``[B, S, D]`` to the same."""
        rows, length, width = x.shape
        normed = self.norms[0](x)
        q = self.q(normed).view(rows, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(normed).view(rows, length, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
        k, v = (one.repeat_interleave(self.heads // self.kv_heads, 1) for one in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        tokens = self.norms[1](x).flatten(0, 1)
        gates = self.router(tokens).float().softmax(-1).to(x.dtype)[:, :top_k]
        sent = tokens[:, None].expand(-1, top_k, -1).reshape(-1, width)  # a copy, as dispatch makes one
        gate, up = self.up(sent).chunk(2, dim=-1)
        back = self.down(F.silu(gate) * up).view(-1, top_k, width)
        out: Tensor = x + (back * gates[..., None]).sum(1).view_as(x)
        return out

    @property
    def further(self) -> int:
        """Parameters of the own experts but one."""
        return (self.own - 1) * sum(one.numel() for one in (*self.up.parameters(), *self.down.parameters()))


def automodel(
    name: str,
    depth: int,
    sizes: tuple[int, int, int, int, int, int],
    top_k: int,
    words: int,
    machines: tuple[int, int, int],
    tokens: float,
    *,
    recomputed: bool,
    note: str,
) -> Row:
    """A language model with experts of NeMo Automodel on H100, FSDP and expert parallelism in bf16, 4,096 tokens a row.

    Args:
        name: Of the model.
        depth: Blocks.
        sizes: Width, heads, heads of keys, head size, inner size of an expert, experts.
        top_k: Experts of a token.
        words: Of the vocabulary.
        machines: GPUs, which are as many as experts are split over, rows of a micro-batch, micro-batches of a step.
        tokens: Published tokens a second on a GPU.
        recomputed: Whether blocks are.
        note: See ``Row``.
    """
    (width, *_, experts), (gpus, batch, accumulated) = sizes, machines
    with torch.device("meta"):
        block = RoutedBlock(*sizes, experts // gpus).bfloat16()
        x = torch.zeros(batch, 4096, width, dtype=torch.bfloat16)
        head = nn.Linear(width, words, bias=False, dtype=torch.bfloat16)
    x.requires_grad_()
    made, size, useful = counted("0", block, lambda: block(x, top_k), _FP32_OF_BF16, causal=True, recomputed=recomputed)
    banks = gpus * (block.further + sum(one.numel() for one in (*block.up.parameters(), *block.down.parameters())))
    banks //= _FP32_OF_BF16
    one_expert = banks // experts
    size = replace(size, trained=size.trained - one_expert + banks, experts=banks)
    sent = 2.0 * batch * 4096 * top_k * width
    made = replace(made, routed=sent * (2 if recomputed else 1), routed_gradient=sent)
    layers = _repeated((made, size, useful), depth)
    layers.append(counted("head", head, lambda: head(x).float(), _FP32_OF_BF16))
    cluster = Cluster(load_hardware("h100"), max(1, gpus // 8), min(8, gpus))
    step, _ = step_of(layers, cluster, batch, "zero", 3, accumulated=accumulated, experts_over=gpus)
    what = f"NeMo Automodel {name}, {gpus} H100, {batch} x 4,096 tokens a GPU, x {accumulated}"
    return Row(what, "tokens/s a GPU", (tokens, tokens), accumulated * batch * 4096 / step.seconds, note)


def mpt(name: str, width: int, depth: int, heads: int, batch: int, published: float) -> Row:
    """An MPT of llm-foundry, of OPT's layers, which have the same matrices; FSDP in bf16, 2,048 tokens a row."""
    fields: dict[str, Any] = {"hidden_size": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    fields |= {"attn_implementation": "sdpa", "activation_function": "gelu", "dropout": 0.0, "attention_dropout": 0.0}
    config = OPTConfig(**fields)
    with torch.device("meta"):
        block = OPTDecoderLayer(config).to(torch.bfloat16)
        x = torch.zeros(batch, 2048, width, dtype=torch.bfloat16)
        head = nn.Linear(width, 50368, bias=False, dtype=torch.bfloat16)
    x.requires_grad_()

    def run() -> Tensor:
        out = block(x)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    layers = _repeated(counted("0", block, run, _FP32_OF_BF16, causal=True), depth)
    layers += [counted("head", head, lambda: head(x).float(), _FP32_OF_BF16)]
    _, mfu = step_of(layers, Cluster(load_hardware("h100"), 1, 8), batch, "zero", 3)
    what = f"llm-foundry MPT {name}, 8 H100, {batch} x 2,048 tokens a GPU"
    return Row(what, "MFU, %", (published,) * 2, 100 * mfu, "batch recalled; nothing is recomputed")


def vit() -> Row:
    """Images a second that 40 % MFU of one H100 needs of a ViT-B/16."""
    with torch.device("meta"):
        fields: dict[str, Any] = {"attn_implementation": "sdpa"}
        model = ViTModel(ViTConfig(**fields), add_pooling_layer=False).bfloat16()
        pixels = torch.zeros(8, 3, 224, 224, dtype=torch.bfloat16)
    _, _, useful = counted("vit", model, lambda: model(pixel_values=pixels).last_hidden_state)
    rate = 0.4 * load_hardware("h100").peak_flops("bf16") / (useful / 8)
    return Row("ViT-B/16 at 40 % MFU, one H100", "images/s", (3200.0, 3200.0), rate, "counting alone", is_run=False)


def _repeated(one: tuple[Pass, LayerSize, float], times: int) -> list[tuple[Pass, LayerSize, float]]:
    made, size, useful = one
    return [(replace(made, layer=str(number)), size, useful) for number in range(times)]


def rows() -> list[Row]:
    """All of the table."""
    compiled, eager = "compiled there", "not compiled; two nodes"
    forced = "balance is forced"
    windows = f"{forced}; every second layer looks at 128 positions only"
    qwen, small, large = (2048, 32, 4, 128, 768, 128), (2880, 64, 8, 64, 2880, 32), (2880, 64, 8, 64, 2880, 128)
    return [
        clip("B/32", "B", 32, 256, 16, 773),
        clip("B/16", "B", 16, 192, 22, 332),
        clip("L/14", "L", 14, 96, 50, 70),
        llama(1, (33, 39)),
        mpt("1 B", 2048, 24, 16, 14, 42),
        mpt("7 B", 4096, 32, 32, 6, 46),
        kempner("7B", 4096, 32, 1, 1, (2, 4), 57.8, compiled),
        kempner("7B", 4096, 32, 2, 1, (2, 4), 51.7, compiled),
        kempner("7B", 4096, 32, 4, 1, (4, 2), 53.8, compiled),
        kempner("13B", 5120, 40, 8, 2, (4, 4), 44.4, eager),
        automodel("Qwen3-30B-A3B", 48, qwen, 8, 151936, (8, 4, 16), 12040, recomputed=True, note=forced),
        automodel("GPT-OSS-20B", 24, small, 4, 201088, (8, 2, 16), 13058, recomputed=False, note=windows),
        automodel("GPT-OSS-120B", 36, large, 4, 201088, (64, 2, 4), 7626, recomputed=False, note=windows),
        vit(),
    ]


def table(found: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| what | figure | published | estimated | error | |", "|---|---|---|---|---|---|"]
    for row in found:
        low, high = row.published
        known = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        lines.append(f"| {row.what} | {row.figure} | {known} | {row.estimated:,.0f} | {row.error:+.0%} | {row.note} |")
    off = [abs(row.error) for row in found if row.is_run]
    alone = len(found) - len(off)
    said = "The row of counting alone is" if alone == 1 else f"The {alone} rows of counting alone are"
    lines += ["", f"The median error of the {len(off)} runs is {statistics.median(off):.0%}. {said} not among them."]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or puts it between its marks in the page."""
    made = table(rows())
    sys.stdout.write(made + "\n")
    if "--write" in sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        marked = re.compile(r"(<!-- published -->\n).*?(<!-- end -->)", re.S)
        PAGE.write_text(marked.sub(lambda match: f"{match[1]}{made}\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
