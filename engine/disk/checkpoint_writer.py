"""Writes checkpoints while training continues.

A save has three parts. Between two steps, every process takes a *snapshot* of its own shard: it copies the tensors into
memory that is reserved for this. The processes tell each other the sizes of their shards, from which each knows its
place in the file of its machine. Then a thread *writes* the process' part. When all processes have written theirs, the
first one *seals* the checkpoint: it writes the manifest, renames the folder and deletes old checkpoints. Threads do not
communicate. The main threads check between two steps whether all threads have finished, so that no collective runs at
the same time as those of training. One save is under way at a time; the next one waits for it.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.disk.checkpoint import FORMAT, HOST_FOLDER, MANIFEST, TrainerState, checkpoint_steps, prune, step_folder
from engine.errors import CheckpointError
from engine.hosts.base import Host
from engine.hosts.shards import KeptMemory, Records
from engine.processes import ranks
from engine.processes.files import FileRecord, sync_folder, write_synced
from engine.processes.seeds import generator_states


@dataclass(frozen=True)
class _Save:
    """A save that is under way.

    Attributes:
        final: The folder to which the temporary one is renamed.
        state: State of the loop when the snapshot was taken.
        work: The running task of this process' thread.
        prunes: Whether old checkpoints are deleted once this one is sealed.
        sealing: Whether all files are written.
    """

    final: Path
    state: TrainerState
    work: Future[Records]
    prunes: bool
    sealing: bool = False

    def outcome(self) -> tuple[str | None, Records]:
        """Waits for the thread; returns the error, or the records of the written files."""
        try:
            return None, self.work.result()
        except OSError as error:
            return str(error), {}


class CheckpointWriter:
    """Writes the checkpoints of a stage. Every method is called by every process."""

    def __init__(self, folder: Path, *, asynchronous: bool, keep_last: int) -> None:
        """Creates a writer; nothing is written yet.

        Args:
            folder: The stage's ``checkpoints`` folder, on a file system that all processes share.
            asynchronous: Continue training while the files are written; this takes memory for a copy of the shard.
            keep_last: Number of newest checkpoints that stay, beside the best.
        """
        self._folder, self._asynchronous, self._keep_last = folder, asynchronous, keep_last
        self._memory = KeptMemory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="omnivl-checkpoint")
        self._save: _Save | None = None

    def save(self, host: Host, state: TrainerState, loader_state: Mapping[str, Any], *, prunes: bool = True) -> None:
        """Takes a snapshot and writes it: in the background, or before this returns.

        Args:
            host: The host whose shard is written.
            state: The loop's state, equal on every process.
            loader_state: This process' position in the data, JSON.
            prunes: Delete old checkpoints once this one is sealed.

        Raises:
            CheckpointError: This checkpoint, or the one before, could not be written, on whichever process; raised on
                all. Earlier checkpoints stay.
        """
        self.finish()
        shard = host.shard()
        if self._asynchronous:
            shard = shard.kept(self._memory)
        own = {"loader": loader_state, "generators": generator_states()}
        shard = replace(shard, state=json.dumps(own).encode())
        place = shard.placed()
        final = step_folder(self._folder, state.step)
        unfinished = _unfinished(final)

        def write() -> Records:
            (unfinished / HOST_FOLDER).mkdir(parents=True, exist_ok=True)
            written = shard.write(unfinished / HOST_FOLDER, place)
            records = {f"{HOST_FOLDER}/{name}": ranges for name, ranges in written.items()}
            if shard.index is not None:
                trainer = json.dumps(asdict(state), indent=2).encode()
                records["trainer.json"] = [write_synced(unfinished / "trainer.json", [trainer])]
            return records

        self._save = _Save(final, state, self._thread.submit(write), prunes)
        if not self._asynchronous:
            self.finish()

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes its part of the current checkpoint."""
        return self._save is not None and not self._save.work.done()

    def poll(self, writing: bool) -> None:
        """Seals the current checkpoint once every process has written its part. To be called every step.

        Args:
            writing: Whether ``is_writing`` on any process.

        Raises:
            CheckpointError: It could not be written, on whichever process; raised on all.
        """
        if self._save is not None and not writing:
            self._go_on(self._save)

    def finish(self) -> None:
        """Waits until no save is under way.

        Raises:
            CheckpointError: As ``poll``.
        """
        while self._save is not None:
            self._go_on(self._save)

    def prune(self, best_step: int | None) -> None:
        """Deletes old checkpoints while no save is under way, as the end of a save does."""
        assert self._save is None, "a save is under way"
        if ranks.rank() == 0:
            prune(self._folder, self._keep_last, best_step)

    def _go_on(self, save: _Save) -> None:
        outcomes = ranks.gather(save.outcome(), tuple[str | None, Records])
        self._save = None
        failed = [f"process {rank}: {problem}" for rank, (problem, _) in enumerate(outcomes) if problem is not None]
        if failed:
            self._give_up(save, failed)
        if not save.sealing:
            seal = self._sealing(save, [records for _, records in outcomes]) if ranks.rank() == 0 else dict
            self._save = replace(save, work=self._thread.submit(seal), sealing=True)

    def _sealing(self, save: _Save, shares: Sequence[Records]) -> Callable[[], Records]:
        """Seals the checkpoint: done by the first process when all have written their files."""
        unfinished = _unfinished(save.final)

        def seal() -> Records:
            manifest = {"format": FORMAT, "step": save.state.step, "files": dict(sorted(_joined(shares).items()))}
            write_synced(unfinished / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            for inner in (unfinished / HOST_FOLDER, unfinished):
                sync_folder(inner)
            shutil.rmtree(save.final, ignore_errors=True)  # a torn checkpoint of the same step must not be in the way
            unfinished.rename(save.final)
            sync_folder(self._folder)
            if save.prunes:
                prune(self._folder, self._keep_last, save.state.best_step)
            return {}

        return seal

    def _give_up(self, save: _Save, failed: Sequence[str]) -> None:
        """Removes the written files and raises, on every process."""
        if ranks.rank() == 0:
            shutil.rmtree(_unfinished(save.final), ignore_errors=True)
        ranks.barrier()
        earlier = [step for step in checkpoint_steps(self._folder) if step_folder(self._folder, step) != save.final]
        none = "there is none before it"
        left = f"{step_folder(self._folder, earlier[-1]).name} is left as it was" if earlier else none
        raise CheckpointError(
            f"{save.final}: could not be written ({'; '.join(failed)}); {left}. Make room or mend the disk, and give "
            "the same command again: it goes on from the newest whole checkpoint"
        )


def _joined(shares: Sequence[Records]) -> dict[str, list[FileRecord]]:
    """All ranges of each file in their order: the headers of all its processes, then the data of all of them."""
    of_file: dict[str, list[Sequence[FileRecord]]] = {}
    for share in shares:
        for name, ranges in share.items():
            of_file.setdefault(name, []).append(ranges)
    return {name: [one for each in zip(*written, strict=True) for one in each] for name, written in of_file.items()}


def _unfinished(final: Path) -> Path:
    """The temporary folder in which a checkpoint is written."""
    return final.with_name(final.name + ".tmp")
