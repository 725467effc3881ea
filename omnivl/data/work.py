"""The work of a data worker: makes one micro-batch from its description.

A request is complete (entry, positions, step), so that the result does not depend on the worker or the number of
workers.
"""

import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from omnivl.data.balance import shares
from omnivl.data.batch import Batch, has_visual
from omnivl.data.collate import Collator, EmptyFrames, new_frames
from omnivl.data.config import DataEntryConfig, LoaderConfig
from omnivl.data.example import Example, ExampleReader, PixelCache
from omnivl.data.fields import Field
from omnivl.data.gpu_decode import gpu_for_decoding
from omnivl.data.limits import DecodeLimits
from omnivl.data.ring import Ring, Slot
from omnivl.data.sizes import InputSizes
from omnivl.data.sources.base import BadSampleError, Rejection, Source, naming
from omnivl.data.sources.shards import ShardSource
from omnivl.data.sources.stream import StreamReader
from omnivl.errors import DataError

Part = Literal["core", "prepared", "fields"]


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch of one replica.

    Attributes:
        entry: Index of the data entry.
        first: Position of the first sample.
        count: Number of samples.
        step: Optimizer step.
        first_shard: Where streams begin; read once per worker.
    """

    entry: int
    first: int
    count: int
    step: int
    first_shard: int = 0


@dataclass(frozen=True)
class Result:
    """A finished micro-batch on its way to the training process.

    ``shard`` is (worker, shard at which it would resume), of streams only.

    Only pixels are sent as tensors, in shared memory, ``frames`` of workers in a slot of the ``Ring`` if one was free:
    small arrays are faster through the pipe. Keys of ``arrays`` are the part of the batch and the name there.
    """

    batch: Batch
    frames: Tensor | Slot | None
    arrays: dict[tuple[Part, str], np.ndarray]
    rejections: tuple[Rejection, ...]
    shard: tuple[int, int] | None
    second_view: Tensor | None = None

    def unpack(self, ring: Ring | None = None) -> Batch:
        """The batch with its tensors back in place, ``ring`` being that of the workers."""
        frames = self.frames
        if isinstance(frames, Slot):
            assert ring is not None, "a slot is one of a ring"
            frames = ring.frames(frames)
        tensors = {place: torch.from_numpy(array) for place, array in self.arrays.items()}
        return replace(
            self.batch,
            frames=frames,
            token_ids=tensors.get(("core", "token_ids")),
            identity=tensors["core", "identity"],
            label=tensors["core", "label"],
            position=tensors["core", "position"],
            grids=tensors.get(("core", "grids")),
            second_view=self.second_view,
            prepared={name: tensor for (part, name), tensor in tensors.items() if part == "prepared"},
            fields={name: tensors.get(("fields", name), value) for name, value in self.batch.fields.items()},
        )


@dataclass(frozen=True)
class Failure:
    """A user's mistake found by a worker: sent as a value, so that its message arrives without a traceback."""

    message: str


_CORE = ("token_ids", "identity", "label", "position", "grids")
_EMPTY = torch.empty(0)
_MAX_BAD_OF_STREAM = 1000


def pack(
    batch: Batch, rejections: Sequence[Rejection], shard: tuple[int, int] | None, slot: Slot | None = None
) -> Result:
    """Converts a batch, whose frames may lie in a slot, to the form that is sent through the pipe."""
    core = {name: tensor for name in _CORE if (tensor := getattr(batch, name)) is not None}
    fields = {name: value for name, value in batch.fields.items() if isinstance(value, Tensor)}
    parts: dict[Part, Mapping[str, Tensor]] = {"core": core, "prepared": batch.prepared, "fields": fields}
    arrays = {
        (part, name): np.array(tensor.numpy()) for part, tensors in parts.items() for name, tensor in tensors.items()
    }
    raw = {name: () if isinstance(value, Tensor) else value for name, value in batch.fields.items()}
    hollow = Batch(
        batch.kind, None, None, _EMPTY, _EMPTY, _EMPTY, captions=batch.captions, entry=batch.entry, fields=raw
    )
    return Result(hollow, slot or batch.frames, arrays, tuple(rejections), shard, batch.second_view)


def follow_parent(worker: int) -> None:
    """Ends a worker when its parent process has ended, also by a crash. Called in the worker.

    torch's own watch looks at the forkserver, which in turn lives as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="omnivl-parent", daemon=True).start()


class BatchMaker(torch.utils.data.Dataset[Result | Failure]):
    """Turns requests into batches. Picklable; files, caches and streams are opened in the process that uses them."""

    def __init__(
        self,
        entries: Sequence[DataEntryConfig],
        keys: Sequence[str],
        sources: Sequence[Source | None],
        collator: Collator,
        *,
        sizes: InputSizes,
        asked: Mapping[str, Mapping[str, Field]],
        config: LoaderConfig,
        seed: int,
        replica: int,
        replicas: int,
    ) -> None:
        """Describes the work; a source of None is a stream. ``asked`` are types of fields by key of the entry."""
        self._entries, self._keys, self._sources, self._collator = tuple(entries), tuple(keys), tuple(sources), collator
        self._sizes, self._asked, self._config, self._seed = sizes, asked, config, seed
        self._replica, self._replicas = replica, replicas
        on_gpu = config.decode == "gpu"
        self._device = gpu_for_decoding(config.start_method, config.num_workers) if on_gpu else None
        self._readers: dict[int, ExampleReader] = {}
        self._streams: dict[int, StreamReader] = {}
        self._cache: PixelCache | None = None
        self.ring: Ring | None = None  # of the workers, while there are some

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_readers": {}, "_streams": {}, "_cache": None}

    def __getitem__(self, request: BatchRequest) -> Result | Failure:
        """Makes one micro-batch."""
        try:
            return self._make(request)
        except DataError as error:
            return Failure(str(error))

    def close(self) -> None:
        """Closes files. Streams end, and begin anew at their requests' ``first_shard``."""
        for stream in self._streams.values():
            stream.close()
        self._streams = {}
        for source in self._sources:
            if isinstance(source, ShardSource):
                source.close()

    def _make(self, request: BatchRequest) -> Result:
        refused: dict[str, Rejection] = {}
        kept: list[Example] = []
        while True:
            if self._sources[request.entry] is None:
                examples, rejections, shard = self._from_stream(request, kept)
            else:
                examples, rejections, shard = *self._from_list(request, refused), None
            slot: Slot | None = None

            def empty(shape: tuple[int, ...]) -> Tensor:
                nonlocal slot
                frames, slot = self._empty(shape)
                return frames

            try:
                batch = self._collated(request, examples, empty)
                return pack(batch, rejections, shard, slot)
            except Exception:
                if slot is not None and self.ring is not None:
                    self.ring.free(slot)
                found = self._unfit(request, examples)
                if not found or len(found) == len(examples) > 1:
                    raise  # no sample's fault
            refused |= found
            kept = [example for example in examples if example.where not in found]
            if self._sources[request.entry] is None:
                self._stream(request).rejections += [*rejections, *found.values()]

    def _empty(self, shape: tuple[int, ...]) -> tuple[Tensor, Slot | None]:
        """Memory for frames; of a worker in a slot, if there is a free one."""
        worker = get_worker_info()
        taken = None if worker is None or self.ring is None else self.ring.take(worker.id, shape)
        return (new_frames(shape), None) if taken is None else taken

    def _collated(self, request: BatchRequest, examples: Sequence[Example], empty: EmptyFrames | None = None) -> Batch:
        kind, key = self._entries[request.entry].kind, self._keys[request.entry]
        types = self._reader(request.entry).field_types
        return self._collator.collate(examples, kind, key, request.step, types, empty)

    def _unfit(self, request: BatchRequest, examples: Sequence[Example]) -> dict[str, Rejection]:
        """The samples of a batch that cannot be collated, tried one by one: a tokenizer fails for their texts."""
        found: dict[str, Rejection] = {}
        for example in examples:
            try:
                with naming("unusable", example.where):
                    self._collated(request, [example])
            except BadSampleError as error:
                found[example.where] = error.rejection
        return found

    def _from_list(
        self, request: BatchRequest, refused: Mapping[str, Rejection]
    ) -> tuple[list[Example], list[Rejection]]:
        reader = self._reader(request.entry)
        examples: list[Example] = []
        rejections: list[Rejection] = []
        for position in self._positions(request, reader):
            try:
                example, bad = reader.example(position, refused)
            except DataError:
                raise
            except Exception as error:
                raise RuntimeError(f"{reader.describe(position)}: {type(error).__name__}: {error}") from error
            examples.append(example)
            rejections += bad
        return examples, rejections

    def _positions(self, request: BatchRequest, reader: ExampleReader) -> Sequence[int]:
        """The positions of a micro-batch: its own part of the global batch's, or a part that takes as long as others'.

        Only the latter needs the positions of all replicas; each finds the same.
        """
        own = range(request.first, request.first + request.count)
        unequal = self._sizes.native and has_visual(self._entries[request.entry].kind)
        if not unequal or self._replicas == 1:
            return own
        first = request.first - self._replica * request.count
        every = range(first, first + self._replicas * request.count)
        chosen: list[int] = shares(reader.visual_work(every), self._replicas)[self._replica].tolist()
        return [every[place] for place in chosen]

    def _from_stream(
        self, request: BatchRequest, kept: Sequence[Example]
    ) -> tuple[list[Example], list[Rejection], tuple[int, int]]:
        """Fills a batch up; ``kept`` are its samples so far."""
        stream, reader = self._stream(request), self._reader(request.entry)
        examples = list(kept)
        taken = {example.position for example in kept}
        bad = 0
        for position in range(request.first, request.first + request.count):
            while position not in taken:
                try:
                    examples.append(reader.finish(stream.next(), position))
                    taken.add(position)
                    bad = 0
                except BadSampleError as error:
                    stream.rejections.append(error.rejection)
                    bad += 1
                    if bad >= _MAX_BAD_OF_STREAM:
                        source = self._entries[request.entry].source
                        detail = f"{bad} samples in a row cannot be used; the last one: {error}"
                        raise DataError(f"data source {source!r}: {detail}") from error
        rejections, stream.rejections = stream.rejections, []
        info = get_worker_info()
        return examples, rejections, (0 if info is None else info.id, stream.shard)

    def _reader(self, number: int) -> ExampleReader:
        if number not in self._readers:
            cv2.setNumThreads(0)  # workers are the parallelism; small pictures gain nothing from more threads
            config = self._config
            if self._cache is None and config.cache_decoded:
                self._cache = PixelCache(config.cache_mebibytes)
            self._readers[number] = ExampleReader(
                self._entries[number],
                self._sources[number],
                self._sizes,
                key=self._keys[number],
                seed=self._seed,
                limits=DecodeLimits(config.max_pixels, config.max_frames),
                cache=self._cache,
                asked=self._asked.get(self._keys[number]),
                device=self._device,
            )
        return self._readers[number]

    def _stream(self, request: BatchRequest) -> StreamReader:
        if request.entry not in self._streams:
            info = get_worker_info()
            worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
            self._streams[request.entry] = StreamReader(
                self._entries[request.entry],
                key=self._keys[request.entry],
                seed=self._seed,
                buffer=self._config.shuffle_buffer,
                timeout=self._config.stream_timeout_seconds,
                reader=self._replica * workers + worker,
                readers=self._replicas * workers,
                first_shard=request.first_shard,
            )
        return self._streams[request.entry]
