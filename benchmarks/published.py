"""Estimates against published figures of other engines, whose models are counted by their classes of ``transformers``.

python -m benchmarks.published            # prints the table of docs/estimate.md
python -m benchmarks.published --write    # puts it there

No run of these engines is repeated: the estimate is that of this engine's hosts for the same matrices, batch and
machines. Batches and numbers of machines are recalled.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, OPTConfig, ViTConfig, ViTModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from engine.estimate.hardware import load_hardware
from engine.estimate.layers import accelerator_kernels
from engine.estimate.live import LivePeak
from engine.estimate.operations import OperationCounter
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
    """

    what: str
    figure: str
    published: tuple[float, float]
    estimated: float
    note: str

    @property
    def error(self) -> float:
        """Against the nearest published value; 0 within their range."""
        low, high = self.published
        nearest = min(max(self.estimated, low), high)
        return self.estimated / nearest - 1


def counted(name: str, module: nn.Module, run: Callable[[], Tensor], share: int = 1) -> tuple[Pass, LayerSize, float]:
    """What a module does forward and backward, its size, and its useful operations.

    Args:
        name: Of the layer.
        module: On ``meta``.
        run: Its forward pass.
        share: Divisor of the number of parameters: how many of them take four bytes together.
    """
    forward, backward = OperationCounter(), OperationCounter()
    with accelerator_kernels():
        with forward:
            out = run()
        ones = torch.ones_like(out)
        with backward:
            torch.autograd.backward([out], [ones])
    elements = sum(one.numel() for one in module.parameters()) // share
    useful = sum(count * one.flops for one, count in forward.found.items())
    made = Pass(name, forward.found, backward.found, *(0.0,) * 7, 0)
    return made, LayerSize(elements, 0, 0, 0, 0, elements, 0), 3 * useful


def step_of(
    layers: Sequence[tuple[Pass, LayerSize, float]], cluster: Cluster, batch: int, host: HostName, zero: int
) -> tuple[StepEstimate, float]:
    """A step of one micro-batch of counted layers, and its MFU."""
    passes = [one for one, _, _ in layers]
    sizes = {one.layer: size for one, size, _ in layers}
    flops = sum(useful for _, _, useful in layers)
    work = ModelWork(
        tuple(passes), sizes, batch, ZeroSizes(50_000_000, 1, 1, 1), (LivePeak(0, 0, 0),), flops / batch, 1.0
    )
    parallel = ParallelConfig(host=host, zero_stage=3 if zero == 3 else 1)
    stage = StagePlan("published", 1, (), (), parallel=parallel, batch=BatchConfig(micro_batch_size_per_gpu=batch))
    step = estimate_step(stage, work, cluster)
    return step, flops / (step.seconds * cluster.hardware.peak_flops("bf16"))


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
    run = counted("0", block, lambda: block(x, position_embeddings=(angles, angles)), _FP32_OF_BF16)
    layers = [*_repeated(run, 32), counted("head", head, lambda: head(x).float(), _FP32_OF_BF16)]
    _, mfu = step_of(layers, Cluster(load_hardware("h100"), nodes, 8), 1, "zero", 3)
    return Row(
        "torchtitan Llama-8B, 8 H100, 8,192 tokens a GPU", "MFU, %", published, 100 * mfu, "nothing is recomputed"
    )


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

    layers = _repeated(counted("0", block, run, _FP32_OF_BF16), depth)
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
    return Row("ViT-B/16 at 40 % MFU, one H100", "images/s", (3200.0, 3200.0), rate, "counting alone")


def _repeated(one: tuple[Pass, LayerSize, float], times: int) -> list[tuple[Pass, LayerSize, float]]:
    made, size, useful = one
    return [(Pass(str(number), made.forward, made.backward, *(0.0,) * 7, 0), size, useful) for number in range(times)]


def rows() -> list[Row]:
    """All of the table."""
    return [
        clip("B/32", "B", 32, 256, 16, 773),
        clip("B/16", "B", 16, 192, 22, 332),
        clip("L/14", "L", 14, 96, 50, 70),
        llama(1, (33, 39)),
        mpt("1 B", 2048, 24, 16, 14, 42),
        mpt("7 B", 4096, 32, 32, 6, 46),
        vit(),
    ]


def table(found: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| what | figure | published | estimated | error | |", "|---|---|---|---|---|---|"]
    for row in found:
        low, high = row.published
        known = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        lines.append(f"| {row.what} | {row.figure} | {known} | {row.estimated:,.0f} | {row.error:+.0%} | {row.note} |")
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
