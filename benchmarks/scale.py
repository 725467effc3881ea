"""What a step costs on 8 and on 512 ranks, and on an accelerator, counted on a CPU.

Bytes and a host's seconds are those of a chain with as many tensors as ``base`` but narrow, under torch's ``fake``
process group: collectives return at once, so that what is left is what a host does. Kernels, casts and memory are
counted while ``base`` runs on the ``meta`` device, with an accelerator's attention and grouped products. The stage
trains UniVLC with a queue, VLM and LM on image-text pairs, 64 of each micro-batch. Writes ``docs/scale.md``.

python -m benchmarks scale
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Ratio, Spread, short
from benchmarks.record import ROOT, Options, Report, Table, main_of, markdown_table, write_page
from engine.estimate.layers import accelerator_kernels, blank_batches, blank_states
from engine.estimate.operations import OperationCounter
from engine.estimate.vocabulary import tokenizer_or_size
from engine.estimate.work import BlankGather
from engine.hosts.micro_batch import first_states
from engine.plan.parse import parse_plan
from engine.plan.plan import StagePlan
from engine.step.compiled import compile_blocks
from engine.step.freeze import freeze_idle
from moe.config import DenseConfig, FeedForwardConfig, LIMoEConfig
from moe.feed_forward import build_feed_forward
from moe.slot import Slot
from moe.tokens import Tokens
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.positions import SHARES, chosen_positions
from omnivl.chain.state import State
from omnivl.data.balance import shares, visual_work
from omnivl.data.collate import PATCH_STRIDE
from omnivl.objectives.contrast import pair_contrast
from omnivl.objectives.spread_keys import SpreadKeys
from omnivl.parts.ragged import row_mask
from omnivl.parts.sizes import MODALITIES, Patches
from omnivl.parts.vit import DividedBlock

PLAN = """
name: scale
tokenizer: emoji
model: {preset: base, text_length: 64, vocab_size: 30522}
parallel: {host: zero, zero_stage: 3, precision: bf16}
launch: {processes: 1}
batch: {micro_batch_size_per_gpu: 64}
stages:
  - name: spatial
    steps: 10
    data: [{source: emoji, kind: image_text}]
    objectives: [{kind: univlc, queue_size: 65536}, vlm, lm]
    optimizer: {lr: 1e-4}
"""
NARROW = [
    *("model.hidden_size=48", "model.image_size=32", "model.text_length=8", "model.projection_size=16"),
    *("model.vocab_size=4096", "batch.micro_batch_size_per_gpu=2"),
]
"""As many tensors as ``base``, and products that take next to no time."""
ALONE = "stages.spatial.objectives=[{kind: univlc, queue_size: 64}]"
TOGETHER = "stages.spatial.objectives=[{kind: univlc, queue_size: 64}, vlm, lm]"
FEW, MANY = 8, 512
GRAPHS = [
    *(*NARROW, "model.vision_layers=2", "model.text_layers=1", "model.alignment_layers=1"),
    *("model.generation_layers=1", "parallel.zero_stage=1"),
]
"""A block of each kind."""
ROUTED = "model.ffn={kind: limoe, num_experts: 32, implementation: grouped}"
CAPTIONS, LONGEST = range(2, 43), 128
"""Words of captions, which make 4 to 44 tokens, 24 in the mean, and positions that the model has."""
TOKENS, WIDTH = 64 * 197, 768
"""Of a micro-batch of images, and of ``base``."""
REPLICAS, OWN_STEPS = 4, 20
MOST_KERNELS, MOST_CASTS = 2500, 100
"""Of a micro-batch of ``base``."""
PAGE = ROOT / "docs" / "scale.md"
BEFORE = {
    "bytes gathered / element read, ZeRO-3, UniVLC alone": "20",
    "bytes gathered / element read, ZeRO-3, UniVLC, VLM and LM": "6",
    f"host's seconds on {MANY} ranks / on {FEW}, ZeRO-3": "6",
    f"host's seconds of a step on {MANY} ranks, ZeRO-3": "7.2",
    f"host's seconds of a step on {MANY} ranks, ZeRO-1": "0.25",
    "waits of the host for its device in a step, ZeRO-1": "7 to 8",
    "waits of the host for its device in a step, ZeRO-3": "7 to 8",
    f"operations, captions of 24 tokens on average / all of {LONGEST}": "1",
    "casts of a micro-batch": "1,873",
    "kernels of a micro-batch": "4,617",
    "graph breaks in blocks": "8 in each routed one",
    "kept for the backward pass, 32 experts / dense": "1.41",
    "bytes that contrast keeps / element of its matrix": "24",
}
CONTRAST = (256, 512)
"""Queries, as many as keys, of the two problems between which kept memory is compared."""


@dataclass(frozen=True)
class Found:
    """What a process says of its steps (``benchmarks.scale_ranks``).

    Attributes:
        seconds: CPU seconds of each step, the last few.
        gathered: Bytes of gathered parameters in a step.
        read: Elements of the parameters that a step reads, momentum twins among them.
        unread: Elements of the others.
        waits: How often the host waits for its device in a step, by place.
    """

    seconds: tuple[float, ...]
    gathered: int
    read: int
    unread: int
    waits: Mapping[str, int]


def on_ranks(ranks: int, zero_stage: int, objectives: str, steps: int) -> Found:
    """Runs steps as one of so many ranks, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale_ranks", str(ranks), str(zero_stage), str(steps), objectives]
    done = subprocess.run(command, cwd=ROOT, env=_environment(ranks), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"scale: {' '.join(command[2:])} failed\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Found(**found | {"seconds": tuple(found["seconds"])})


def _environment(ranks: int) -> dict[str, str]:
    local = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, 8))}
    return os.environ | local | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def stage_of(overrides: Sequence[str] = ()) -> tuple[StagePlan, Any]:
    """The stage and its tokenizer."""
    plan = parse_plan(PLAN, "benchmarks/scale.py", overrides, 1)
    return plan.stages[0], tokenizer_or_size(plan)


class CastCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies into another dtype.

    Attributes:
        found: By the two dtypes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks whether it casts."""
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        before, after = None, None
        if name == "_to_copy":
            before, after = args[0].dtype, out.dtype
        elif name == "copy_":
            before, after = args[1].dtype, args[0].dtype
        elif name == "_foreach_copy_":
            before, after = args[1][0].dtype, args[0][0].dtype
        if before != after:
            self.found[f"{before} to {after}".replace("torch.", "")] += 1
        return out


def on_meta() -> tuple[Chain, State]:
    """``base`` and a micro-batch without memory, as one of eight replicas."""
    stage, tokenizer = stage_of()
    device = torch.device("meta")
    with device:
        chain = build_chain(
            stage.model,
            stage.objectives,
            tokenizer.special,
            gather=BlankGather(FEW),
            compute_dtype=torch.bfloat16,
        )
    freeze_idle(chain, stage.layouts())
    chain.train()
    return chain, blank_states(stage, tokenizer, device)[0]


def kernels_and_casts() -> tuple[int, Counter[str]]:
    """Of the forward and backward pass of a micro-batch, the second one: the first one learns what is cast."""
    chain, state = on_meta()
    kernels, casts = OperationCounter(), CastCounter()
    with accelerator_kernels():
        chain(state)
        chain.discard_step()
        with casts, kernels:
            chain(state)["loss"].backward()
    return sum(kernels.found.values()), casts.found


def operations(padded: bool) -> float:
    """Of a sample with one of ``CAPTIONS`` in ``LONGEST`` positions, forward and backward.

    Args:
        padded: Whether padding is computed.
    """
    stage, tokenizer = stage_of([f"model.text_length={LONGEST}", "stages.spatial.objectives=[univlc, vlm, mlm, lm]"])
    device = torch.device("meta")
    with device:
        chain = build_chain(
            stage.model, stage.objectives, tokenizer.special, gather=LocalGather(), compute_dtype=torch.bfloat16
        )
    freeze_idle(chain, stage.layouts())
    (batch,) = blank_batches(stage, tokenizer, () if padded else CAPTIONS)
    (state,) = first_states([batch], partial(plan_layout, stage.objectives), device, chain, LocalGather())
    chain.train()
    with accelerator_kernels(), FlopCounterMode(display=False) as counter:
        chain(state)["loss"].backward()
    return float(counter.get_total_flops()) / batch.size


def own_sizes() -> tuple[float, float, float]:
    """Of steps on pictures whose area and ratio are log-normal, with 16 of them for each of ``REPLICAS`` replicas.

    Returns:
        The work of the blocks of ``base`` on the heaviest replica over the mean, in the worst step; the same without
        balancing; and the share of the computed positions that are no padding.
    """
    stage, _ = stage_of(["model.sizes=native"])
    sizes, random = stage.model.inputs, np.random.default_rng(0)
    block = DividedBlock(stage.model.stacks["visual"], Patches.of_images(224, 16, native=True), 0)
    worst, unbalanced, real, computed = 1.0, 1.0, 0, 0
    for _ in range(OWN_STEPS):
        area, ratio = random.normal(4.6, 0.8, REPLICAS * 16), random.normal(0, 0.25, REPLICAS * 16)
        pictures = np.exp(np.stack([area - ratio, area + ratio], axis=1)).astype(np.int64) + 1
        given = shares(visual_work(sizes, False, pictures), REPLICAS)
        counts = sizes.grids(False, pictures).prod(axis=1)
        exact = np.array([block.flops(1, count, is_video=False, first_only=False) for count in counts.tolist()])
        totals, orderly = exact[given].sum(axis=1), exact.reshape(REPLICAS, -1).sum(axis=1)
        worst = max(worst, totals.max() / totals.mean())
        unbalanced = max(unbalanced, orderly.max() / orderly.mean())
        for row in given:
            places = PATCH_STRIDE * -(-int(counts[row].max()) // PATCH_STRIDE)
            mask = row_mask(torch.arange(places) < torch.from_numpy(counts[row])[:, None], 1, "tokens first")
            real += int(mask.sum())
            computed += len(chosen_positions(mask, max(1, mask.numel() // SHARES)))
    return float(worst), float(unbalanced), real / computed


@contextmanager
def kept_elements() -> Iterator[list[int]]:
    """Elements of each tensor that autograd keeps within the block."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def bytes_by_element_of_the_matrix() -> float:
    """Bytes that the contrastive loss keeps for its backward pass, by element of the matrix of similarities."""
    kept = []
    for count in CONTRAST:
        query, own = (F.normalize(torch.randn(count, 16), dim=-1).requires_grad_(True) for _ in range(2))
        numbers = torch.arange(count)
        with kept_elements() as sizes:
            pair_contrast(*SpreadKeys.both(query, own, numbers, LocalGather()), torch.tensor(10.0))
        kept.append(4 * sum(sizes))
    few, many = CONTRAST
    # a + b N + c N**2 through 0 and the two problems: what grows faster than the queries and keys.
    return max(0.0, (kept[1] / many - kept[0] / few) / (many - few))


def kept_by(ffn: FeedForwardConfig) -> int:
    """Bytes that the second of two feed-forward layers keeps for its backward pass, without copies of weights."""
    found = dict[int, int]()
    with torch.device("meta"):
        slot = Slot(1, ("image",), MODALITIES, depth=2)
        layer = build_feed_forward(ffn, WIDTH, 4 * WIDTH, slot)
        x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weights = {one.numel() for one in layer.parameters() if one.dim() > 1}
    kept: list[Tensor] = []  # alive, so that no storage takes the number of another

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        if tensor.numel() not in weights:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with accelerator_kernels(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, Tokens.of("image", x))
    return sum(found.values())


def graph_breaks() -> int:
    """Graphs into which ``torch.compile`` cuts the blocks, dense ones and routed ones, beyond one for each."""
    torch._dynamo.utils.counters.clear()
    for changes in ((), (ROUTED,)):
        stage, tokenizer = stage_of([*GRAPHS, *changes])
        chain = build_chain(
            stage.model, stage.objectives, tokenizer.special, gather=LocalGather(), compute_dtype=torch.bfloat16
        )
        freeze_idle(chain, stage.layouts())
        chain.train()
        compile_blocks(chain, backend="aot_eager")
        for state in blank_states(stage, tokenizer, torch.device("cpu")):
            chain(state)["loss"].backward()
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def run(options: Options) -> Report:
    """Counts everything."""
    steps = 4 if options.quick else 8
    alone, together = (on_ranks(FEW, 3, objectives, steps) for objectives in (ALONE, TOGETHER))
    spread = {stage: on_ranks(MANY, stage, TOGETHER, steps) for stage in (1, 3)}
    sharded = on_ranks(FEW, 1, TOGETHER, steps)
    kernels, casts = kernels_and_casts()
    balanced, in_order, real = own_sizes()
    experts = LIMoEConfig(num_experts=32, implementation="grouped")
    by_element = {"UniVLC alone": alone, "UniVLC, VLM and LM": together}
    ratios = [
        *(
            Ratio(f"bytes gathered / element read, ZeRO-3, {name}", _one(one.gathered / one.read), at_most=4.2)
            for name, one in by_element.items()
        ),
        Ratio(f"host's seconds on {MANY} ranks / on {FEW}, ZeRO-3", _over(spread[3], together), at_most=1.5),
        Ratio(f"host's seconds of a step on {MANY} ranks, ZeRO-3", Spread.of(spread[3].seconds), at_most=0.5),
        Ratio(f"host's seconds on {MANY} ranks / on {FEW}, ZeRO-1", _over(spread[1], sharded)),
        Ratio(f"host's seconds of a step on {MANY} ranks, ZeRO-1", Spread.of(spread[1].seconds)),
        Ratio("waits of the host for its device in a step, ZeRO-1", _one(sum(spread[1].waits.values())), at_most=1),
        Ratio("waits of the host for its device in a step, ZeRO-3", _one(sum(spread[3].waits.values())), at_most=1),
        Ratio(
            f"operations, captions of 24 tokens on average / all of {LONGEST}",
            _one(operations(padded=False) / operations(padded=True)),
        ),
        Ratio(f"heaviest / mean visual work of {REPLICAS} replicas, own sizes", _one(balanced), at_most=1.05),
        Ratio("the same with samples in their order", _one(in_order)),
        Ratio("real positions / computed ones, own sizes", _one(real), at_least=0.95),
        Ratio("casts of a micro-batch", _one(casts.total()), at_most=MOST_CASTS),
        Ratio("kernels of a micro-batch", _one(kernels), at_most=MOST_KERNELS),
        Ratio("graph breaks in blocks", _one(graph_breaks()), at_most=0),
        Ratio(
            "kept for the backward pass, 32 experts / dense",
            _one(kept_by(experts) / kept_by(DenseConfig())),
            at_most=1.05,
        ),
        Ratio("bytes that contrast keeps / element of its matrix", _one(bytes_by_element_of_the_matrix()), at_most=0),
    ]
    rows = [[name, f"{one.read:,}", f"{one.unread:,}", f"{one.gathered:,}"] for name, one in by_element.items()]
    return Report(
        "scale",
        " ".join((__doc__ or "").partition("\n\npython")[0].split()),
        ratios,
        [
            Table("Gathers of ZeRO-3", ("objectives", "elements read", "not read", "bytes gathered a step"), rows),
            Table("Casts", ("from, to", "in a micro-batch"), [[name, str(n)] for name, n in casts.most_common()]),
        ],
        {"narrow": " ".join(NARROW), "steps": steps},
    )


def _one(value: float) -> Spread:
    return Spread.of([value])


def _over(many: Found, few: Found) -> Spread:
    typical = Spread.of(few.seconds).median
    return Spread.of([seconds / typical for seconds in many.seconds])


def page_of(found: Mapping[str, Any]) -> str:
    """``docs/scale.md`` from the content of the result file."""
    rows = [
        [
            *(one["name"], BEFORE.get(one["name"], ""), short(one["value"]["median"])),
            *(one["target"], {True: "yes", False: "**no**", None: ""}[one["met"]]),
        ]
        for one in found["ratios"]
    ]
    parts = [
        "# Scale",
        "Written by `python -m benchmarks scale` from its "
        f"[result](../benchmarks/results/{found['benchmark']}-cpu.json); do not edit.",
        found["what"].replace("``", "`"),
        "No GPU has run this: what a step takes on one is not known from these figures. They say what a GPU would have "
        "to wait for. Before: at commit 1ffdc5d, as an audit counted it.",
        markdown_table(("figure", "before", "now", "wanted", "met"), rows),
    ]
    for table in found["tables"]:
        parts += [f"## {table['title']}", markdown_table(table["columns"], table["rows"])]
    machine = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
    parts.append(f"Measured on {found['date'][:10]}, {found['cpu']}, {machine}, commit {found['commit'][:10]}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Runs, and writes the page: ``docs/scale.md`` of a full run, else beside the result file."""
    write_page(main_of("scale", __doc__, run), PAGE, page_of)


if __name__ == "__main__":
    main()
