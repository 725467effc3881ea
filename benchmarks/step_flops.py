"""FLOP/s of a training step relative to the machine's fastest matrix product, and its time by operation.

python -m benchmarks.step_flops

A step is forward, backward, clipping, AdamW and the momentum update of the plain host, with every objective that acts
on the kind of batch. Its floating point operations are those of its matrix products, worked out by arithmetic
(``omnivl.chain.flops.chain_flops``): attention and feed-forward count; normalisations, softmax and recomputation
do not. They are compared with square bf16 products, which take turns with the steps, also if the step computes in fp32.
A profile of the same steps then shows which operations take the time.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from benchmarks.measure import Ratio, Spread, Step, over, rates, short, take_turns
from benchmarks.operations import shares_of_time
from benchmarks.record import Options, Report, Table, main_of
from engine.hosts import PlainHost
from engine.step.optimizer import OptimizerConfig
from engine.step.report import StepResult
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch, DataKind, is_video
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import LM, MCM, MFM, MLM, MRM, VLM, Objective, PrepareContext, UniVLC

OBJECTIVES: Sequence[Objective] = (MLM(), MRM(), MFM(), MCM(), UniVLC(queue_size=1024), VLM(), LM())
PRODUCT = "bf16 product"
_TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=4096, num_reserved=5)


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        preset: Name of the model's size.
        model: Its sizes.
        kind: What a batch holds.
        batch_size: Samples.
        dtype: Data type in which the chain computes.
    """

    preset: str
    model: OmniVL
    kind: DataKind
    batch_size: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name in the results."""
        return f"{self.preset} {self.kind} {str(self.dtype).removeprefix('torch.')}"

    @property
    def num_frames(self) -> int:
        """Frames of a sample."""
        return self.model.num_frames if is_video(self.kind) else 1

    @cached_property
    def flops(self) -> float:
        """Floating point operations of the step's matrix products."""
        layout = plan_layout(OBJECTIVES, self.kind, self.batch_size, self.num_frames)
        with torch.device("meta"):
            chain = build_chain(self.model, OBJECTIVES, _TOKENS)
        return chain_flops(chain, layout, text_tokens=self.batch_size * self.model.text_length)


def make_batch(case: Case) -> Batch:
    """A batch of noise with everything that the objectives draw.

    Texts have the full length, so that the work is the same on devices on which blocks do not leave padding out.
    """
    model, draw = case.model, torch.Generator().manual_seed(0)
    side = model.video_size if is_video(case.kind) else model.image_size
    shape = (case.batch_size, case.num_frames, 3, side, side)
    frames = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    token_ids = torch.randint(5, _TOKENS.vocab_size, (case.batch_size, model.text_length), generator=draw)
    token_ids[:, 0], token_ids[:, -1] = _TOKENS.cls, _TOKENS.sep
    own = torch.arange(case.batch_size)
    batch = Batch(case.kind, frames, token_ids, own, torch.full_like(own, -1), own)
    tubelet = model.tubelet_size if is_video(case.kind) else 1
    context = PrepareContext(0, "benchmark", _TOKENS, model.inputs.grid(is_video(case.kind)), 0, tubelet)
    prepared: dict[str, torch.Tensor] = {}
    for objective in OBJECTIVES:
        if objective.demands(case.kind, batch.size) is not None:
            prepared |= objective.prepare(batch, context)
    return replace(batch, prepared=prepared)


def training_step(case: Case, device: torch.device) -> Callable[[], StepResult]:
    """A training step of the plain host that can be repeated; the batch starts on the CPU, as in training."""
    torch.manual_seed(0)
    chain = build_chain(case.model, OBJECTIVES, _TOKENS, compute_dtype=case.dtype).train()
    host = PlainHost(chain, OptimizerConfig(), partial(plan_layout, OBJECTIVES), total_steps=1000, device=device)
    batch, steps = make_batch(case), itertools.count()
    return lambda: host.step([batch], next(steps))


def best_product(device: torch.device) -> tuple[Step, float]:
    """The square bf16 product with the highest rate among some sizes, and its floating point operations per call."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    products = {size: _product(size, device) for size in sizes}
    seconds = take_turns(products, 3, device)
    size = max(sizes, key=lambda size: size**3 / min(seconds[size]))
    repeats = max(1, round(0.2 / min(seconds[size])))

    def repeat() -> None:
        for _ in range(repeats):
            products[size]()

    return repeat, repeats * 2.0 * size**3


def _product(size: int, device: torch.device) -> Step:
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def cases_of(options: Options) -> list[Case]:
    """Sizes, kinds and precisions; on a GPU batches are larger."""
    larger = 16 if options.device.type == "cuda" else 1
    found: list[Case] = []
    presets: tuple[str, ...] = ("tiny",) if options.quick else ("tiny", "small")
    kinds: tuple[tuple[DataKind, int], ...] = (("image_text", 32), ("video_text", 4))
    for preset in presets:
        model = OmniVL.presets[preset]
        model = replace(model, vocab_size=max(model.vocab_size, _TOKENS.vocab_size))
        for kind, size in kinds:
            size = size // 2 if options.quick else size * larger
            found += [Case(preset, model, kind, size, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return found


def run(options: Options) -> Report:
    """Runs the benchmark, one case after the other, each in turns with the product."""
    rounds = 2 if options.quick else 7
    product, product_flops = best_product(options.device)
    ratios: list[Ratio] = []
    speeds: list[list[str]] = []
    profiles: list[Table] = []
    for case in cases_of(options):
        step = training_step(case, options.device)
        seconds = take_turns({case.name: step, PRODUCT: product}, rounds, options.device, warmup=2)
        reached = over([case.flops / s for s in seconds[case.name]], [product_flops / s for s in seconds[PRODUCT]])
        ratios.append(Ratio(f"{case.name}: FLOP/s of a step / of the best bf16 product", reached))
        speeds.append(_speed_row(case, seconds, product_flops))
        profiles.append(_profile_table(case, step, options, reached.median))
    columns = ("step", "samples", "seconds", "samples/s", "GFLOP", "GFLOP/s", "product's GFLOP/s")
    what = " ".join((__doc__ or "").split("\n\n")[2].split())
    settings = {"objectives": ", ".join(o.key for o in OBJECTIVES), "rounds": rounds}
    return Report("step_flops", what, ratios, [Table("Speed", columns, speeds), *profiles], settings)


def _speed_row(case: Case, seconds: dict[str, list[float]], product_flops: float) -> list[str]:
    own = seconds[case.name]
    figures = (
        Spread.of(own).median,
        rates(case.batch_size, own).median,
        case.flops / 1e9,
        rates(case.flops / 1e9, own).median,
        rates(product_flops / 1e9, seconds[PRODUCT]).median,
    )
    return [case.name, str(case.batch_size), *(short(figure) for figure in figures)]


def _profile_table(case: Case, step: Step, options: Options, reached: float) -> Table:
    """Shares of a step's time by category of operation, and what the products alone reach."""
    shares = shares_of_time(step, options.device, repeats=1 if options.quick else 3)
    products = shares.get("matrix products", 0.0) + shares.get("attention products", 0.0)
    rows = [[name, f"{100 * share:.1f} %"] for name, share in shares.items()]
    if products > 0:
        rows.append(["all products, FLOP/s over the best product's", f"{reached / products:.2f}"])
    return Table(f"Where the time goes: {case.name}", ("operations", "share of the step"), rows)


if __name__ == "__main__":
    main_of("step_flops", __doc__, run)
