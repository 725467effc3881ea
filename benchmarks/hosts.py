"""Overhead of hosts: plain against a bare PyTorch loop over the same chain, ZeRO-1 and ZeRO-3 against plain.

python -m benchmarks.hosts

All contenders train equal chains on the same batches in one process, with AdamW, clipping, momentum twins and queue. On
one replica ZeRO shards nothing, so that the difference is the cost of its hooks, copies and collectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, over, rates, take_turns
from benchmarks.record import Options, Report, Table, main_of
from engine.hosts import Host, create_host, replica_group
from engine.hosts.pipeline.cut import cut, layer_costs
from engine.hosts.pipeline.division import Division, divide_chain
from engine.plan.parallel import ParallelConfig
from engine.processes.collectives import make_gather
from engine.processes.process_group import finish, join_process_group
from engine.step.freeze import freeze_idle
from engine.step.optimizer import ChainOptimizer, OptimizerConfig, parameter_groups, set_learning_rates
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import Gather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import Objective, UniVLC

AT_MOST = 1.03
OBJECTIVES: Sequence[Objective] = (UniVLC(queue_size=1024, batch_keys="momentum"),)
OPTIMIZER = OptimizerConfig(gradient_clipping=1.0)


def run(options: Options) -> Report:
    """Builds all contenders from the same weights and lets them take turns."""
    join_process_group(always=True)
    config = replace(OmniVL.presets["tiny"], vocab_size=4096)
    batch_size = 8 if options.quick else 32
    batch = pairs(config, batch_size)
    plain = ParallelConfig(host="plain", precision="bf16")
    contenders: dict[str, Callable[[], object]] = {
        "bare loop": _bare_loop(build(config), batch, options.device),
        "plain": partial(_step, host_of(plain, config, batch_size, options.device), batch),
    }
    for stage in (1, 3):
        parallel = replace(plain, host="zero", zero_stage=stage)
        contenders[f"zero {stage}"] = partial(_step, host_of(parallel, config, batch_size, options.device), batch)
    seconds = take_turns(contenders, rounds=3 if options.quick else 15, device=options.device, warmup=2)
    plain_over_bare = over(seconds["plain"], seconds["bare loop"])
    ratios = [Ratio("plain host / bare loop, time of a step", plain_over_bare, at_most=AT_MOST)]
    ratios += [
        Ratio(f"ZeRO-{stage} / plain host, time of a step", over(seconds[f"zero {stage}"], seconds["plain"]))
        for stage in (1, 3)
    ]
    rows = [[name, str(rates(batch_size, taken))] for name, taken in seconds.items()]
    return Report(
        "hosts",
        "One optimizer step on image-text pairs, preset tiny, bf16 activations, one process, contenders in turns.",
        ratios,
        [Table("Pairs per second", ["contender", "median (range)"], rows)],
        {"preset": "tiny", "batch_size": batch_size, "objectives": [o.name for o in OBJECTIVES]},
    )


def build(config: OmniVL, gather: Gather | None = None) -> Chain:
    """The chain that is trained, the same in every process."""
    tokens = SpecialTokens(0, 1, 2, 3, 4, vocab_size=config.vocab_size, num_reserved=5)
    torch.manual_seed(0)
    chain = build_chain(config, OBJECTIVES, tokens, gather=gather, compute_dtype=torch.bfloat16)
    freeze_idle(chain, [plan_layout(OBJECTIVES, "image_text", 1, 1)])  # as every stage does before it asks for a host
    return chain


def pairs(config: OmniVL, size: int) -> Batch:
    """So many images with texts, all of noise."""
    draw = torch.Generator().manual_seed(0)
    pixels = (size, 1, 3, config.image_size, config.image_size)
    own = torch.arange(size)
    words = torch.randint(5, config.vocab_size, (size, config.text_length), generator=draw)
    return Batch("image_text", torch.randint(0, 256, pixels, generator=draw, dtype=torch.uint8), words, own, own, own)


def host_of(
    parallel: ParallelConfig, config: OmniVL, micro_batch_size: int, device: torch.device, micro_batches: int = 1
) -> Host:
    """A host of the chain over all processes."""
    chain = build(config, make_gather(replica_group(parallel)))
    return create_host(
        parallel,
        chain,
        OPTIMIZER,
        OBJECTIVES,
        total_steps=1000,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=micro_batches,
        device=device,
        division=_division(chain, parallel) if parallel.host == "pipeline" else None,
    )


def _division(chain: Chain, parallel: ParallelConfig) -> Division:
    return divide_chain(chain, cut(costs_of(chain), parallel.pipeline_stages))


def costs_of(chain: Chain) -> list[float]:
    """What each layer of the chain is estimated to cost."""
    return list(layer_costs(chain, [plan_layout(OBJECTIVES, "image_text", 1, 1)]).values())


def _step(host: Host, batch: Batch) -> None:
    result = host.step([batch], 0)
    assert not result.skipped


def _bare_loop(chain: Chain, batch: Batch, device: torch.device) -> Callable[[], float]:
    """A training loop without a host."""
    chain.to(device)
    groups = parameter_groups(chain, OPTIMIZER)
    optimizer = ChainOptimizer([group.options for group in groups], OPTIMIZER)
    set_learning_rates(optimizer, groups, OPTIMIZER.lr)
    trained = [parameter for parameter in chain.parameters() if parameter.requires_grad]
    layout = plan_layout(OBJECTIVES, batch.kind, batch.size, batch.num_frames)

    def step() -> float:
        state = State.from_batch(batch, layout)
        on_device: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in state.items()}
        loss = chain(State(on_device, layout))["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(trained, OPTIMIZER.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        chain.after_step()
        return float(loss.item())

    return step


if __name__ == "__main__":
    main_of("hosts", __doc__, run)
    finish()
