"""An endless sequence of batches, whose state is a few integers from which it resumes exactly.

Micro-step k takes one entry (``mixture``) on every replica. If ``c`` samples of that entry were used before, the global
batch is the positions ``[c, c + micro_batch_size * replicas)`` of the entry's endless order, and replica r has its r-th
part. The sample at a position depends only on the seed, so that it is independent of the number of replicas, workers
and prefetched batches, and a joined batch equals the concatenation of the replicas' batches. Where pictures keep their
sizes, replicas share the same samples by their visual work instead (``balance``): the joined batch then holds the same
samples in another order.
"""

import gc
import multiprocessing
import multiprocessing.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from omnivl.data.batch import Batch, DataKind, has_visual, is_video
from omnivl.data.collate import Collator, Prepare, most_frame_bytes
from omnivl.data.config import DataEntryConfig, LoaderConfig, entry_keys
from omnivl.data.fields import Field
from omnivl.data.mixture import Mixture
from omnivl.data.prefetch import in_thread
from omnivl.data.quarantine import Quarantine
from omnivl.data.ring import Ring
from omnivl.data.sizes import InputSizes
from omnivl.data.sources import is_stream, open_source
from omnivl.data.sources.base import Source
from omnivl.data.sources.shards import ShardSource
from omnivl.data.sources.stream import announce
from omnivl.data.tokenizer import Tokenizer
from omnivl.data.work import BatchMaker, BatchRequest, Failure, Result, follow_parent
from omnivl.errors import DataError

_LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket."""

_HELD = 2
"""Batches of one worker that the training process is taken to hold at once."""


@dataclass(frozen=True)
class LoaderState:
    """Position of a loader. Equal on every replica, except for ``shards``, which differs.

    Attributes:
        micro_step: Micro-batches taken.
        gradient_accumulation_steps: Micro-batches per optimizer step when they were taken.
        positions: Samples taken over all replicas, by entry.
        shards: Shard to resume at, by entry; streams only.
    """

    micro_step: int = 0
    gradient_accumulation_steps: int = 1
    positions: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "micro_step": self.micro_step,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "positions": dict(self.positions),
            "shards": dict(self.shards),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        return cls(**values)

    def with_accumulation(self, steps: int) -> "LoaderState":
        """The same position for another number of micro-batches per optimizer step.

        Raises:
            DataError: The state lies inside an optimizer step.
        """
        if steps == self.gradient_accumulation_steps or self.micro_step == 0:
            return replace(self, gradient_accumulation_steps=steps)
        step, inside = divmod(self.micro_step, self.gradient_accumulation_steps)
        if inside:
            raise DataError(
                f"data state at micro-batch {inside} of {self.gradient_accumulation_steps} of optimizer step {step}: "
                f"gradient_accumulation_steps cannot change to {steps} there; resume from the end of a step"
            )
        return replace(self, micro_step=step * steps, gradient_accumulation_steps=steps)


class Loader:
    """Endless batches of one stage for one replica. Iterating yields ``(batch, state after it)``."""

    def __init__(
        self,
        entries: Sequence[DataEntryConfig],
        *,
        loader_config: LoaderConfig,
        sizes: InputSizes,
        tokenizer: Tokenizer,
        prepare: Prepare | None = None,
        asked: Mapping[str, Mapping[str, Field]] | None = None,
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        replica: int = 0,
        replicas: int = 1,
        state: LoaderState | None = None,
        quarantine_log: Path | None = None,
        trims: bool = False,
    ) -> None:
        """Opens and checks the sources; starts no worker yet.

        Args:
            entries: The stage's mixture.
            loader_config: Workers and bounds.
            sizes: Sizes of pictures, clips and texts.
            tokenizer: Texts to ids.
            prepare: Draws ``Batch.prepared``; None for nothing.
            asked: Types of the fields that objectives ask for, by key of the entry (see ``entry_keys``).
            micro_batch_size: Samples per micro-batch and replica.
            gradient_accumulation_steps: Micro-batches per optimizer step.
            seed: The stage's seed.
            replica: This data-parallel replica.
            replicas: Number of data-parallel replicas.
            state: Where to resume; None for the beginning.
            quarantine_log: JSON-lines file for bad samples. Replicas may share it.
            trims: See ``Collator``.

        Raises:
            DataError: A source is missing, empty or too bad, or the weights are no weights.
        """
        assert 0 <= replica < replicas, "the replica is one of the replicas"
        self.entries = tuple(entries)
        self.keys = entry_keys(entries)
        self._config, self._micro_batch_size, self._prepare = loader_config, micro_batch_size, prepare
        self._sizes = sizes
        self._accumulation, self._replica, self._replicas = gradient_accumulation_steps, replica, replicas
        self.mixture = Mixture([entry.weight for entry in entries], seed)
        self.quarantine = Quarantine(
            max_bad_fraction=loader_config.max_bad_fraction,
            min_samples_to_judge=loader_config.min_samples_to_judge,
            log=quarantine_log,
        )
        self.sources = tuple(self._open(entry, sizes, seed) for entry in self.entries)
        self.state = (state or LoaderState()).with_accumulation(gradient_accumulation_steps)
        self._maker = BatchMaker(
            self.entries,
            self.keys,
            self.sources,
            Collator(sizes, tokenizer, prepare, trims=trims),
            sizes=sizes,
            asked=asked or {},
            config=loader_config,
            seed=seed,
            replica=replica,
            replicas=replicas,
        )
        self._running: Iterator[Result | Failure] | None = None
        self._places: dict[str, dict[int, int]] = {}

    def __iter__(self) -> Iterator[tuple[Batch, LoaderState]]:
        """Goes on from ``self.state``.

        Raises:
            DataError: Too many samples are bad.
        """
        self.close()
        self._places = {}
        self._running = self._results()
        for result in self._running:
            if isinstance(result, Failure):
                raise DataError(result.message)
            batch = result.unpack(self._maker.ring)
            self.quarantine.record(batch.size, result.rejections)
            self.state = self._after(self.state)
            if result.shard is not None:
                self.state = self._note_shard(self.state, *result.shard)
            yield batch, self.state

    def places(self) -> Iterator[tuple[None, LoaderState]]:
        """The states that iterating yields, without loading samples, for processes that need none."""
        while True:
            self.state = self._after(self.state)
            yield None, self.state

    def close(self) -> None:
        """Stops workers, threads and streams, and closes files. The next iteration makes unused batches again."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]  # it is a generator
            self._running = None
        self._maker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kind_before(self, state: LoaderState) -> DataKind:
        """The kind of the micro-batch before a state. Equal on every replica, also on processes without batches."""
        return self.entries[self.mixture.entry(state.micro_step - 1)].kind

    def _open(self, entry: DataEntryConfig, sizes: InputSizes, seed: int) -> Source | None:
        if is_stream(entry.source):
            announce(entry)
            return None
        source = open_source(
            entry,
            seed=seed,
            index_cache=self._config.index_cache,
            num_frames=sizes.num_frames,
            size=sizes.video_size,
        )
        num_shards = source.num_shards if isinstance(source, ShardSource) else 1
        self.quarantine.record_source(entry.source, len(source), num_shards, source.rejections, log=self._replica == 0)
        return source

    def _requests(self) -> Iterator[BatchRequest]:
        state = self.state
        while True:
            entry = self.mixture.entry(state.micro_step)
            key = self.keys[entry]
            yield BatchRequest(
                entry=entry,
                first=state.positions.get(key, 0) + self._replica * self._micro_batch_size,
                count=self._micro_batch_size,
                step=state.micro_step // self._accumulation,
                first_shard=state.shards.get(key, 0),
            )
            state = self._after(state)

    def _after(self, state: LoaderState) -> LoaderState:
        key = self.keys[self.mixture.entry(state.micro_step)]
        taken = state.positions.get(key, 0) + self._micro_batch_size * self._replicas
        return replace(state, micro_step=state.micro_step + 1, positions={**state.positions, key: taken})

    def _note_shard(self, state: LoaderState, worker: int, shard: int) -> LoaderState:
        """Advances a stream's resume position to the slowest worker's, once all have reported."""
        key = self.keys[self.mixture.entry(state.micro_step - 1)]
        places = self._places.setdefault(key, {})
        places[worker] = shard
        complete = len(places) == max(1, self._config.num_workers)
        return replace(state, shards={**state.shards, key: min(places.values())}) if complete else state

    def _results(self) -> Iterator[Result | Failure]:
        if self._config.num_workers == 0:
            return in_thread(self._maker, self._requests(), self._config.prefetch_factor)
        return self._in_workers()

    def _in_workers(self) -> Iterator[Result | Failure]:
        context = multiprocessing.get_context(self._config.start_method)
        self._maker.ring = self._new_ring()
        # Made before the workers, which then have their sockets in it too: whoever removes it removes theirs.
        _refuse_long(multiprocessing.util.get_temp_dir())
        gc.collect()  # a forked worker that frees what libav's threads belong to waits for them for ever
        if self._config.start_method == "forkserver":
            modules = [BatchMaker.__module__, *([] if self._prepare is None else [self._prepare.__module__])]
            context.set_forkserver_preload(modules)  # imported once, not by every worker
        loader = torch.utils.data.DataLoader(
            self._maker,
            sampler=_Stream(self._requests()),
            batch_size=None,
            num_workers=self._config.num_workers,
            prefetch_factor=self._config.prefetch_factor,
            multiprocessing_context=context,
            worker_init_fn=follow_parent,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # the global one must not move when workers start
        )
        yield from loader

    def _new_ring(self) -> Ring | None:
        """Memory for the frames that workers send; None where there are none."""
        count, sizes = self._micro_batch_size, self._sizes
        shown = [entry for entry in self.entries if has_visual(entry.kind)]
        sent = (most_frame_bytes(sizes, is_video(one.kind), count * one.num_frames(sizes.num_frames)) for one in shown)
        slots = self._config.prefetch_factor + _HELD
        return Ring(self._config.num_workers, slots, max(sent)) if shown else None


def _refuse_long(folder: str) -> None:
    """Refuses a temporary folder in which no socket can be made.

    Raises:
        DataError: Its path is too long.
    """
    length, most = len(os.fsencode(folder)), _LONGEST_SOCKET - len("/listener-12345678")
    if length > most:
        raise DataError(
            f"TMPDIR: got a path of {length} bytes for the sockets of data workers ({folder}), allowed are {most}; set "
            "TMPDIR to a shorter one, or loader.num_workers to 0"
        )


class _Stream:
    """An iterator as the sampler that ``DataLoader`` wants."""

    def __init__(self, requests: Iterator[BatchRequest]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._requests


def _unchanged(result: Any) -> Any:
    return result
