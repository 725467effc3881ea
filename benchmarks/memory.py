"""Peak memory of a process under ZeRO-3, against 16 bytes for each trained parameter of its share.

python -m benchmarks.memory

Every contender runs in separate processes, with little data on few positions, so that parameters and their states
dominate. In addition it measures the memory that recomputation keeps for the backward pass, and its time.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Ratio, Spread, over, take_turns
from benchmarks.memory_probe import Sizes, measure_processes
from benchmarks.record import Options, Report, Table, main_of
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import UniVLC

PROCESSES = 4
PHASES = ("build", "start", "steps", "checkpoint", "weights")
FULL: dict[str, Any] = {"hidden_size": 1024, "num_heads": 16, "vision_layers": 8, "text_layers": 8}
ZERO_3 = {"host": "zero", "zero_stage": 3, "precision": "bf16"}
CONTENDERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "built whole": (False, ZERO_3),
    "built by layer": (True, ZERO_3),
    "built by layer, parameters offloaded": (True, {**ZERO_3, "offload": "parameters"}),
}
MODES = ("none", "attention", "ffn", "block")


def run(options: Options) -> Report:
    """Measures memory in processes of their own, then recomputation here."""
    model = {} if options.quick else FULL
    found: dict[str, dict[str, Any]] = {}
    for name, (by_layer, layout) in CONTENDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure_processes(PROCESSES, layout, model, by_layer=by_layer, steps=2, folder=Path(folder))
    sizes = Sizes(**found["built whole"]["sizes"])
    rule, whole, layer = sizes.rule(PROCESSES), 4 * (sizes.trained + sizes.resting), 4 * sizes.largest
    rows = [[name, *(f"{measured['peaks'][phase] / 1e6:,.0f}" for phase in PHASES)] for name, measured in found.items()]
    rows.append(
        ["16 bytes of each trained parameter, 4 of others, over the processes", "", "", f"{rule / 1e6:,.0f}", "", ""]
    )
    rows.append(["the whole parameters", f"{whole / 1e6:,.0f}", "", "", "", ""])
    rows.append(["the largest layer", f"{layer / 1e6:,.0f}", "", "", "", ""])
    ours = found["built by layer"]["peaks"]
    ratios = [
        Ratio(
            "built by layer / built whole, peak of the build",
            _one(ours["build"] / found["built whole"]["peaks"]["build"]),
            at_most=0.5,
        ),
        Ratio("peak of the steps / rule and 4 layers", _one(ours["steps"] / (rule + 4 * layer)), at_most=1.15),
    ]
    recomputed, table = _recomputation(options)
    return Report(
        "memory",
        f"ZeRO-3 on {PROCESSES} processes, {sizes.trained / 1e6:.0f} M trained and {sizes.resting / 1e6:.0f} M resting "
        f"parameters, bf16 activations. Recomputation: one step of the visual tower, preset small, explicit attention.",
        [*ratios, *recomputed],
        [Table("Most that a process held by phase, over a model of few layers, in MB", ["", *PHASES], rows), table],
        {"processes": PROCESSES, "losses, largest relative difference": _apart(list(found.values())), **model},
    )


def _apart(found: list[dict[str, Any]]) -> float:
    """Largest relative difference of the losses of equal runs."""
    steps = zip(*(one["losses"] for one in found), strict=True)
    return max(float((max(losses) - min(losses)) / max(losses)) for losses in steps)


def _one(value: float) -> Spread:
    return Spread.of([value])


def _recomputation(options: Options) -> tuple[list[Ratio], Table]:
    """Bytes kept for the backward pass, and time, by what is recomputed."""
    size = 4 if options.quick else 16
    chains = {
        mode: _chain(replace(OmniVL.presets["small"], vocab_size=4096, momentum=None, recompute=mode)) for mode in MODES
    }
    batch = _batch(OmniVL.presets["small"], size)
    kept = {mode: _kept(chain, batch) for mode, chain in chains.items()}
    seconds = take_turns(
        {mode: partial(_step, chain, batch) for mode, chain in chains.items()},
        rounds=3 if options.quick else 9,
        device=options.device,
        warmup=1,
    )
    rows = [
        [
            mode,
            f"{kept[mode] / 1e6:,.1f}",
            f"{kept[mode] / kept['none']:.2f}",
            str(over(seconds[mode], seconds["none"])),
        ]
        for mode in MODES
    ]
    ratios = [
        Ratio(f"recompute {mode} / none, time of forward and backward", over(seconds[mode], seconds["none"]))
        for mode in MODES[1:]
    ]
    return ratios, Table("Kept for the backward pass", ["recompute", "MB", "of none", "time of none"], rows)


def _chain(config: OmniVL) -> Chain:
    torch.manual_seed(0)
    tokens = SpecialTokens(0, 1, 2, 3, 4, vocab_size=config.vocab_size, num_reserved=5)
    return build_chain(config, (UniVLC(),), tokens, compute_dtype=torch.bfloat16).train()


def _batch(config: OmniVL, size: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    pixels = (size, 1, 3, config.image_size, config.image_size)
    own = torch.arange(size)
    words = torch.randint(5, 4096, (size, config.text_length), generator=draw)
    return Batch("image_text", torch.randint(0, 256, pixels, generator=draw, dtype=torch.uint8), words, own, own, own)


def _loss(chain: Chain, batch: Batch) -> torch.Tensor:
    state: State = chain(State.from_batch(batch, plan_layout((UniVLC(),), "image_text", batch.size, 1)))
    return state["loss"]


def _step(chain: Chain, batch: Batch) -> None:
    chain.zero_grad(set_to_none=True)
    torch.autograd.backward([_loss(chain, batch)])


def _kept(chain: Chain, batch: Batch) -> int:
    """Bytes of the storages that the graph of a step keeps, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in chain.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(chain, batch)
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    main_of("memory", __doc__, run)
