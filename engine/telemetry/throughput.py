"""Speed of a run: samples, tokens and floating point operations per second, and time spent waiting for data."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from engine.telemetry.environment import resident_bytes
from engine.telemetry.peak import Peak
from omnivl.architectures import Architecture
from omnivl.chain.chain import Chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Objective
from omnivl.chain.positions import ids_name
from omnivl.data.batch import Batch, is_video

_RECENT_STEPS = 30


class Throughput:
    """Counts this replica's work between two lines of metrics; figures are for all replicas."""

    def __init__(
        self,
        chain: Chain,
        model: Architecture,
        objectives: Sequence[Objective],
        *,
        pad: int,
        replicas: int,
        processes: int,
        peak: Peak,
    ) -> None:
        """Starts the clock.

        Args:
            chain: Its layers give their number of floating point operations; their weights may be on other processes.
            model: Sizes of pictures and clips.
            objectives: They decide on which passes a step makes.
            pad: The padding token, which is not counted.
            replicas: Data-parallel replicas; all do the same amount of work.
            processes: Number of processes; more than replicas if there are pipeline stages.
            peak: Peak of one replica.
        """
        self._chain, self._model, self._objectives, self._pad = chain, model, tuple(objectives), pad
        self._replicas, self._processes, self._peak = replicas, processes, peak
        self._layout = lru_cache(maxsize=None)(partial(plan_layout, self._objectives))
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)
        self.restart()

    def restart(self) -> None:
        """Begins a new window, after a line of metrics."""
        self._began = self._last = time.perf_counter()
        self._cpu_began = self._cpu_last = time.process_time()
        self._steps = self._samples = self._tokens = 0
        self._operations = self._waited = self._saving = 0.0

    def add(self, batches: Sequence[Batch], waited: float) -> None:
        """Adds one optimizer step.

        Args:
            batches: This replica's micro-batches.
            waited: Seconds for which the step waited for them.
        """
        samples = sum(batch.size for batch in batches) * self._replicas
        for batch in batches:
            words = 0 if batch.token_ids is None else int((batch.token_ids != self._pad).sum())
            layout = self._layout(batch.kind, batch.size, batch.num_frames, batch.entry)
            self._tokens += self._replicas * (self._count_patches(batch) + words)
            if batch.grids is not None:
                layout = replace(layout, patches=float(batch.grids.prod(1).double().mean()))
            listed = sum(int((batch.prepared[ids_name(name)] != self._pad).sum()) for name in layout.embedded_texts)
            self._operations += self._replicas * chain_flops(self._chain, layout, words, listed)
        self._samples += samples
        self._waited += waited
        self._steps += 1
        now = time.perf_counter()
        self._recent.append((now - self._last, samples))
        self._last, self._cpu_last = now, time.process_time()

    def pause(self, seconds: float, *, saving: float = 0.0) -> None:
        """Excludes time that was spent on something else since the last step, such as an evaluation or a checkpoint.

        Args:
            seconds: All of it.
            saving: The part of it that checkpoints took.
        """
        self._began += seconds
        self._last += seconds
        now = time.process_time()
        self._cpu_began, self._cpu_last = self._cpu_began + now - self._cpu_last, now
        self._saving += saving

    def samples_per_second(self) -> float:
        """Over the last steps, for the console."""
        seconds = sum(duration for duration, _ in self._recent)
        return sum(samples for _, samples in self._recent) / seconds if seconds > 0 else 0.0

    def figures(self, device: torch.device) -> dict[str, float]:
        """Rates over the window and memory of this process.

        CPU seconds are those of this process times the number of processes, without data workers.

        Args:
            device: The GPU whose memory is asked for too.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        figures = {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / max(1, self._steps),
            "cpu_seconds_per_step": (time.process_time() - self._cpu_began) * self._processes / max(1, self._steps),
            "tflops": self._operations / seconds / 1e12,
            "mfu": self._operations / seconds / (self._peak.flops * self._processes),
            "data_wait": self._waited / seconds,
            "save_seconds": self._saving,
            "memory_gib": resident_bytes() / 2**30,
        }
        if device.type == "cuda":
            figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return figures

    def _count_patches(self, batch: Batch) -> int:
        times = self._model.inputs.time_positions(batch.num_frames) if is_video(batch.kind) else batch.num_frames
        if batch.grids is not None:
            return times * int(batch.grids.prod(1).sum())
        rows, columns = self._model.inputs.grid(is_video(batch.kind))
        return batch.size * times * rows * columns
