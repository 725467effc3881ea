"""All that is estimated of one stage of a plan on a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.errors import PlanError
from engine.estimate.activities import COMPUTE
from engine.estimate.loading import loading_seconds
from engine.estimate.memory import Memory, process_memory
from engine.estimate.skew import Loads, part_of_banks
from engine.estimate.step import StepEstimate, estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.trained import mark_trained
from engine.estimate.work import ModelWork, model_work
from engine.hosts.pipeline.cut import divide_stage
from engine.hosts.pipeline.division import Division
from engine.hosts.zero.experts import expert_banks
from engine.plan.plan import StagePlan
from engine.step.freeze import store_frozen
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.batch import is_video
from omnivl.data.tokenizer import Tokenizer

_RESERVED = 0.92
"""Share of a device's memory that a run may fill: the driver, collectives and fragmentation take the rest."""


@dataclass(frozen=True)
class SampleBytes:
    """Size of a sample in storage.

    Attributes:
        image: Bytes of an image with its text.
        clip: Bytes of a clip with its text.
    """

    image: float = 100e3
    clip: float = 1e6


@dataclass(frozen=True)
class StageEstimate:
    """The estimate of a stage.

    Attributes:
        stage: The stage, with the layout that was estimated.
        cluster: The cluster.
        work: Operations and bytes of its model in a micro-batch.
        step: Time and traffic.
        memories: Memory of a process of each pipeline stage; one entry without a pipeline.
        division: Which passes each pipeline stage makes; None without a pipeline.
        expert_parallel: Processes over which banks are cut.
        data_bytes_per_second: Rate at which all nodes together read.
        checkpoint_bytes: Size of a checkpoint.
        loading: Seconds in which the samples of a step are ready, by what gives them (``storage``, ``decoding``), while
            the step before computes.
    """

    stage: StagePlan
    cluster: Cluster
    work: ModelWork
    step: StepEstimate
    memories: tuple[Memory, ...]
    division: Division | None
    expert_parallel: int
    data_bytes_per_second: float
    checkpoint_bytes: float
    loading: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a step: those of the devices, or of the loader where its samples take longer."""
        return max(self.step.seconds, *self.loading.values(), 0.0)

    @property
    def loader_waits(self) -> float:
        """Seconds of a step in which devices wait for samples."""
        return self.seconds - self.step.seconds

    @property
    def memory(self) -> Memory:
        """Of the fullest process."""
        return max(self.memories, key=lambda one: one.peak)

    @property
    def fits(self) -> bool:
        """Whether the memory of device and host suffices; offloading to files is taken to have disk space enough."""
        hardware = self.cluster.hardware
        on_host = self.cluster.per_node * max(one.host for one in self.memories)
        device = self.memory.peak <= _RESERVED * hardware.memory_gib * 2**30
        if self.stage.parallel.offloading.folder is not None:
            return device
        return device and on_host <= _RESERVED * hardware.host_memory_gib * 2**30

    @property
    def samples(self) -> int:
        """Of a step, over all processes."""
        return self.stage.samples_per_step(self.cluster.processes)

    @property
    def samples_per_second(self) -> float:
        """Over all processes."""
        return self.samples / self.seconds

    @property
    def flops_per_step(self) -> float:
        """Useful floating point operations of all processes."""
        return self.samples * self.work.useful_flops

    @property
    def mfu(self) -> float:
        """Useful operations over the peak of all devices."""
        peak = self.cluster.hardware.peak_flops(self.stage.parallel.precision)
        return self.flops_per_step / (self.seconds * peak * self.cluster.processes)

    @property
    def limits(self) -> str:
        """What takes most of the time of a step, in words."""
        causes = {**self.step.compute_parts, **{k: v for k, v in self.step.exposed.items() if k != COMPUTE}}
        cause = max(causes, key=lambda name: causes[name])
        if self.loader_waits > 0:
            slowest = max(self.loading, key=lambda name: self.loading[name])
            rate = self.samples / self.step.seconds
            return (
                f"the loader: {slowest} gives {self.samples_per_second:,.0f} samples a second, the devices could take "
                f"{rate:,.0f} ({self.loader_waits / self.seconds:.0%} of the step is waiting)"
            )
        return f"{cause} ({causes[cause] / self.seconds:.0%} of the step)"


def device_of(cluster: Cluster) -> torch.device:
    """Device on which work is counted: the CPU for a CPU's kernels, ``meta`` for an accelerator's."""
    return torch.device("cpu" if cluster.hardware.device == "cpu" else "meta")


def outlined(stage: StagePlan, tokenizer: Tokenizer) -> Chain:
    """The chain of a stage without storage, its parameters marked as they are trained.

    Raises:
        UserError: The model's configuration does not fit together.
    """
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, tokenizer.special)
    mark_trained(chain, stage)
    store_frozen(chain, stage.model.stacks)
    return chain


def estimate_stage(
    stage: StagePlan,
    tokenizer: Tokenizer,
    cluster: Cluster,
    *,
    work: ModelWork | None = None,
    chain: Chain | None = None,
    sample_bytes: SampleBytes = SampleBytes(),
    decoded_images_per_second: float | None = None,
    words: int | None = None,
    loads: Loads | None = None,
) -> StageEstimate:
    """Estimates a stage.

    Args:
        stage: Model, layout and batch.
        tokenizer: The plan's.
        cluster: The cluster on which it is to run.
        work: An earlier count of an equal model and micro-batch.
        chain: That of an equal model and micro-batch, from ``outlined``.
        sample_bytes: Size of samples in storage.
        decoded_images_per_second: Images that a node decodes; the hardware's where it is not given.
        words: Of a caption; captions are as long as the model reads where it is not given.
        loads: Of experts, see ``engine.estimate.skew``; None: even ones.

    Raises:
        PlanError: The processes cannot be laid out so.
        UserError: The model's configuration does not fit together.
    """
    parallel, processes = stage.parallel, cluster.processes
    if parallel.host == "pipeline" and processes % parallel.pipeline_stages:
        raise PlanError(
            [
                f"stages.{stage.name}.parallel.pipeline_stages: got {parallel.pipeline_stages} for {processes} "
                "processes; allowed is a divisor of their number; change it, --nodes or --gpus-per-node"
            ]
        )
    replicas = parallel.replicas(processes)
    chain = outlined(stage, tokenizer) if chain is None else chain
    banks = [bank.num_experts for _, bank in expert_banks(chain)]
    experts = parallel.experts_over(banks, cluster.per_node, processes)
    if replicas % experts or any(bank % experts for bank in banks) or (experts > 1 and not banks):
        raise PlanError(
            [
                f"stages.{stage.name}.parallel.expert_parallel_size: got {experts} for {replicas} replicas, banks of "
                f"{', '.join(map(str, sorted(set(banks)))) or 'no'} experts; allowed is a divisor of both; change it"
            ]
        )
    if work is None:
        work = model_work(stage, tokenizer, replicas, device_of(cluster), words)
    division = divide_stage(chain, stage)
    step = estimate_step(
        stage, part_of_banks(work, experts, loads), cluster, expert_parallel=experts, division=division
    )
    memories = tuple(
        process_memory(stage, work, replicas=replicas, expert_parallel=experts, division=division, number=number)
        for number in range(1 if division is None else len(division.cuts))
    )
    per_sample = sum(
        sort.share * (sample_bytes.clip if is_video(sort.entry.kind) else sort.entry.num_pictures * sample_bytes.image)
        for sort in stage.batch_sorts()
    )
    samples = stage.samples_per_step(processes)
    loading = loading_seconds(
        cluster.hardware,
        node_bytes=per_sample * samples / cluster.nodes,
        node_images=work.frames * samples / cluster.nodes,
        decoded_images_per_second=decoded_images_per_second,
    )
    sizes = work.layers.values()
    return StageEstimate(
        stage=stage,
        cluster=cluster,
        work=work,
        step=step,
        memories=memories,
        division=division,
        expert_parallel=experts,
        data_bytes_per_second=per_sample * samples / max(step.seconds, *loading.values()),
        checkpoint_bytes=sum(
            12 * size.trained
            - 4 * sum(one.elements for one in size.matrices)
            + 4 * (size.frozen + size.twins)
            - 2 * size.halved
            + size.queue
            for size in sizes
        ),
        loading=loading,
    )
