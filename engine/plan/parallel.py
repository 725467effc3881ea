"""How a run is distributed over processes: host, precision, launch and batch sizes."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moe.ranges import AUTO, Range

MOST_AUTOMATIC = 32
"""Samples of the largest micro-batch that is worked out."""

HostName = Literal["plain", "zero", "pipeline", "auto"]
ZeroStage = Literal[0, 1, 2, 3]
Precision = Literal["auto", "fp32", "bf16"]
CommunicationDtype = Literal["fp32", "bf16"]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True)
class Offloading:
    """What a host offloads from the memory of the device that computes.

    Attributes:
        optimizer: Gradients, the optimizer's moments and the weights that it updates.
        parameters: Every process' share of the parameters too; they are copied to the device layer by layer.
        folder: Folder of the files that hold them; None keeps them in the host's memory.
    """

    optimizer: bool = False
    parameters: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class ParallelConfig:
    """The host of the chain, and how it distributes it.

    Attributes:
        host: ``plain`` is PyTorch alone; ``zero`` is DeepSpeed with ZeRO; ``pipeline`` is DeepSpeed with the
            chain cut into stages on different processes, each with its replicas. ``auto``, or ``parallel: auto`` in
            place of this section, takes the fastest layout that the planner (``omnivl estimate --search``) finds to fit
            the devices when the run starts: host, ``zero_stage``, what is offloaded, ``expert_parallel_size`` unless it
            is a number, ``pipeline_stages``, and the size of micro-batches. The samples of a step stay what they are,
            and so do those that are compared with one another. The run says what it takes and why.
        zero_stage: What ZeRO shards over the replicas: nothing (0), optimizer states (1), gradients as well (2),
            parameters as well (3). Not read by ``plain``; ``pipeline`` takes 0 and 1.
        precision: Data type of activations and matrix products. Parameters and optimizer states are fp32 always.
            ``auto`` takes bf16 unless the machine multiplies fp32 faster, as a CPU without instructions for bf16 does;
            a resumed run keeps what it began with.
        communication_dtype: Data type in which replicas send each other gradients to average them. ``bf16`` halves
            those bytes; each gradient, and with most backends each partial sum, is rounded to 8 bits of mantissa.
        offload: What is offloaded from the accelerator's memory. ``optimizer``: its moments and gradients, with
            ZeRO 1 to 3; ``parameters``: those and the parameters, with ZeRO 3. Only read by ``zero``.
        offload_device: Where it is offloaded to: the host's memory (``cpu``), or memory-mapped files (``nvme``), which
            the kernel writes out and reads back when memory is scarce.
        nvme_folder: Folder of those files, on a fast disk of each machine. They are deleted when the run ends.
        compile: Whether ``torch.compile`` compiles the blocks, each when it first sees a new kind of batch, after a
            first step without it. That takes minutes; results differ by rounding.
        deterministic: Whether operations take kernels that give the same bits in every run on the same machines. CPUs
            have no others for what is used here. On GPUs attention's backward pass and sums by index are slower then,
            by how much is not known here; torch warns of operations that have none.
        expert_parallel_size: Processes over which every bank of sparse experts is split; they exchange tokens. A
            divisor of the number of experts and of the number of processes (in a pipeline: of one stage); ``auto``
            takes as many processes of one machine as possible. Not read by ``plain``.
        pipeline_stages: Pipeline stages into which the chain is cut; a divisor of the number of processes.
            ``gradient_accumulation_steps`` should be several times as large, so that the pipeline is rarely idle. Only
            read by ``pipeline``.
        pipeline_profile: File that ``omnivl profile`` wrote: the chain is cut by the measured seconds of its layers; by
            estimated operations if no file is given. Only read by ``pipeline``.
    """

    host: HostName = "zero"
    zero_stage: ZeroStage = 1
    precision: Precision = "bf16"
    communication_dtype: CommunicationDtype = "fp32"
    offload: Offload = "none"
    offload_device: Literal["cpu", "nvme"] = "cpu"
    nvme_folder: str | None = None
    compile: bool = False
    deterministic: bool = False
    expert_parallel_size: Annotated[int, Range(1)] | Literal["auto"] = "auto"
    pipeline_stages: Annotated[int, Range(2)] = 2
    pipeline_profile: str | None = None

    @property
    def offloading(self) -> Offloading:
        """The three fields in one."""
        folder = None if self.offload_device == "cpu" or self.nvme_folder is None else Path(self.nvme_folder)
        return Offloading(self.offload != "none", self.offload == "parameters", folder)

    def replicas(self, processes: int) -> int:
        """Number of data-parallel replicas among ``processes``: all, or those of one pipeline stage."""
        return processes // self.pipeline_stages if self.host == "pipeline" else processes

    def experts_over(self, banks: Collection[int], local_processes: int, processes: int) -> int:
        """Processes over which every bank of sparse experts is split.

        Args:
            banks: Number of experts of each bank; empty where the model has none.
            local_processes: Processes on each machine.
            processes: Processes of the run.
        """
        if self.host == "plain":
            return 1
        if self.expert_parallel_size == "auto":
            return math.gcd(*banks, local_processes, self.replicas(processes)) if banks else 1
        return self.expert_parallel_size


@dataclass(frozen=True)
class LaunchConfig:
    """How processes are started.

    Attributes:
        processes: Processes on this machine; ``auto`` takes one per GPU, or two where there is none.
        timeout_seconds: Seconds that a process waits for the others before the run fails.
    """

    processes: Annotated[int, Range(1)] | Literal["auto"] = "auto"
    timeout_seconds: Annotated[int, Range(1)] = 1800


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes.

    Attributes:
        micro_batch_size_per_gpu: Samples of one forward pass on one process. ``auto`` takes a replica's part of
            ``global_batch_size`` over ``gradient_accumulation_steps``; where both are ``auto``, the largest divisor of
            that part up to 32.
        gradient_accumulation_steps: Micro-batches of one optimizer step on one process. ``auto`` takes as many as
            ``global_batch_size`` needs, 1 where that is not given; ``micro_batch_size_per_gpu`` then is the most that a
            process holds: the largest divisor of a replica's part up to it is taken. Means over tokens, patches,
            answers and pairs are those of the whole step, however it is divided. Objectives that compare samples with
            one another see one micro-batch at a time, as routers' losses do: accumulation adds no negatives, but for
            what ``contrast`` says. ``check`` names them.
        global_batch_size: Samples of one optimizer step over all processes. With ``gradient_accumulation_steps: auto``
            every number of processes that divides it runs the plan, and so where it stands alone, which means ``auto``
            for the other two. Otherwise it never changes them. ``check`` and ``pretrain`` print what was worked out.
        contrast: With which samples objectives compare that need embeddings alone (``univlc``, ``itc``,
            ``intra_modal``): those of a ``micro`` batch on all replicas, or of the ``global`` batch, all accumulated
            micro-batches of a kind together. For the latter the encoders run twice on each micro-batch. What others
            compare with, such as the negatives of ``itm`` and ``vlm``, is of one micro-batch either way.
    """

    micro_batch_size_per_gpu: Annotated[int, Range(1), AUTO] = MOST_AUTOMATIC
    gradient_accumulation_steps: Annotated[int, Range(1), AUTO] = 1
    global_batch_size: Annotated[int, Range(1)] | None = None
    contrast: Literal["micro", "global"] = "micro"
