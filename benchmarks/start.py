"""What a stage's start costs on 8, 64 and 512 ranks: host's seconds, memory, collectives.

A chain with as many tensors as ``base`` but narrow, under torch's ``fake`` process group: collectives return at once,
so that what is left is what a host does. Once for process 0, which draws the weights, once for another one. ``base`` in
its own width, whose weights take most of the time, on 512 ranks. Then all of the start of process 0, up to its first
step, with what it tells the others besides tensors.

python -m benchmarks start
"""

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Ratio, Spread, clear_peak, peak_bytes, status_bytes
from benchmarks.record import Options, Report, Table, main_of
from benchmarks.scale import NARROW, PLAN, TOGETHER
from engine.disk.run_folder import RunFolder
from engine.hosts.zero.engine import import_deepspeed
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from engine.processes import messages
from engine.processes.collectives import make_gather
from engine.run.entrance import RunOptions
from engine.run.stage import StageLoop
from engine.run.stage_start import start_chain, start_host
from engine.run.train import train
from engine.step.freeze import freeze_idle
from engine.telemetry.progress import SilentProgress
from omnivl.data.tokenizer import load_tokenizer

RANKS = (8, 64, 512)
LAYOUTS = {"plain": "{host: plain}", "ZeRO-1": "{host: zero, zero_stage: 1}", "ZeRO-3": "{host: zero, zero_stage: 3}"}
WIDE = ("model.image_size=224",)
"""``base`` as it is."""
MIB = 1 << 20


@dataclass(frozen=True)
class Found:
    """What one process says.

    Attributes:
        seconds: CPU seconds.
        peak: Bytes, at most, beyond what it had before.
        collectives: How many, barriers among them.
        sent: Bytes of the tensors in them, as this process has them.
        messages: Sent to all besides tensors.
        gathered: Messages that each process sends to all others.
        message_bytes: Of both, as this process has them.
    """

    seconds: float
    peak: int
    collectives: int
    sent: int
    messages: int = 0
    gathered: int = 0
    message_bytes: int = 0


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives.

    Attributes:
        count: How many.
        bytes: Of their first arguments: what is sent or, of a gather, what arrives.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks whether it communicates."""
        if func.namespace == "c10d":
            self.count += 1
            self.bytes += _size(args[0])
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def apart(task: Callable[..., Found], *arguments: object) -> Found:
    """Runs a task in a forked process, which has all imports, and threads and groups of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task, arguments))
    process.start()
    sender.close()
    try:
        found: Found = receiver.recv()
    except EOFError:
        raise SystemExit(f"start: {task.__name__}{arguments} failed") from None
    finally:
        process.join()
    return found


def _answer(sender: Any, task: Callable[..., Found], arguments: Sequence[Any]) -> NoReturn:
    torch.set_num_threads(1)
    sender.send(task(*arguments))
    os._exit(0)


def plan_of(layout: str, ranks: int, sizes: Sequence[str]) -> Plan:
    """The plan of ``benchmarks.scale``."""
    overrides = [*sizes, TOGETHER, f"parallel={LAYOUTS[layout]}", "parallel.precision=bf16", "guard.hang_seconds=0"]
    return parse_plan(PLAN, "benchmarks/start.py", [*overrides, "loader.num_workers=0"], ranks)


def _join(rank: int, ranks: int) -> torch.device:
    local = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(min(ranks, 8))}
    os.environ |= local | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    return torch.device("cpu")


def chain_and_host(layout: str, ranks: int, rank: int, sizes: Sequence[str]) -> Found:
    """One of so many ranks makes the chain and its host."""
    plan, device = plan_of(layout, ranks, sizes), _join(rank, ranks)
    (stage,), tokenizer = plan.stages, load_tokenizer(plan.tokenizer)
    import_deepspeed(device)
    before, began = status_bytes("VmRSS"), time.process_time()
    clear_peak()
    with CollectiveCounter() as counted:
        gather, run = make_gather(), RunFolder(Path(os.devnull))
        chain, origins = start_chain(plan, 0, run, tokenizer, gather, device, SilentProgress())
        freeze_idle(chain, stage.layouts())
        start_host(chain, stage, device, origins)
    return Found(time.process_time() - began, peak_bytes() - before, counted.count, counted.bytes)


def whole_start(layout: str, ranks: int, folder: str) -> Found:
    """Process 0 of so many starts a run, up to its first step."""
    plan, device = plan_of(layout, ranks, NARROW), _join(0, ranks)
    import_deepspeed(device)
    said: dict[str, int] = {"broadcast": 0, "gather": 0, "bytes": 0}

    def counted(name: str, send: Callable[..., Any]) -> Callable[..., Any]:
        def sending(value: Any, kind: Any, group: Any = None) -> Any:
            said[name] += 1
            said["bytes"] += len(messages.pack(value, kind))
            return send(value, kind, group)

        return sending

    for name in ("broadcast", "gather"):
        setattr(messages, name, counted(name, getattr(messages, name)))

    class ReachedError(Exception):
        """The first step is reached."""

    def take_step(*_: object, **__: object) -> NoReturn:
        raise ReachedError

    StageLoop._take_step = take_step  # type: ignore[method-assign]
    before, began = status_bytes("VmRSS"), time.process_time()
    clear_peak()
    with CollectiveCounter() as counter:
        try:
            train(plan, RunOptions(Path(folder)), device)
        except ReachedError:
            seconds = time.process_time() - began
    peak, bytes_ = peak_bytes() - before, said["bytes"]
    return Found(seconds, peak, counter.count, counter.bytes, said["broadcast"], said["gather"], bytes_)


def run(options: Options) -> Report:
    """Measures everything."""
    many, counts = max(RANKS), RANKS[::2] if options.quick else RANKS
    layouts = ["ZeRO-3"] if options.quick else list(LAYOUTS)
    made = {
        (layout, ranks, rank): apart(chain_and_host, layout, ranks, rank, NARROW)
        for layout in layouts
        for ranks in counts
        for rank in (0, 1)
    }
    folder = tempfile.mkdtemp()
    try:
        whole = {ranks: apart(whole_start, "ZeRO-3", ranks, f"{folder}/{ranks}") for ranks in counts}
    finally:
        shutil.rmtree(folder)
    wide = {} if options.quick else {rank: apart(chain_and_host, "ZeRO-3", many, rank, WIDE) for rank in (0, 1)}
    ratios = [
        Ratio(f"host's seconds on {many} ranks / on {min(RANKS)}, {layout}", _over(made, layout, many), at_most=1.5)
        for layout in layouts
    ]
    ratios += [
        Ratio("collectives of a start, ZeRO-3", _one(made["ZeRO-3", many, 0].collectives), at_most=100),
        Ratio(
            f"all of the start of process 0 on {many} ranks / on {min(RANKS)}",
            _one(whole[many].seconds / whole[min(RANKS)].seconds),
            at_most=1.5,
        ),
    ]
    if wide:
        ratios.append(
            Ratio(
                "base: seconds of another process / of process 0", _one(wide[1].seconds / wide[0].seconds), at_most=0.2
            )
        )
    rows = [
        [layout, str(ranks), "0" if rank == 0 else "another", *_cells(found)]
        for (layout, ranks, rank), found in made.items()
    ]
    rows += [["ZeRO-3, `base`", str(many), "0" if rank == 0 else "another", *_cells(one)] for rank, one in wide.items()]
    told = [
        [str(ranks), *_cells(one), str(one.messages), str(one.gathered), f"{one.message_bytes:,}"]
        for ranks, one in whole.items()
    ]
    columns = ("seconds", "MiB at most", "collectives", "MB in them")
    return Report(
        "start",
        " ".join((__doc__ or "").partition("\n\npython")[0].split()),
        ratios,
        [
            Table("Chain and host", ("layout", "ranks", "process", *columns), rows),
            Table("All of process 0's start, ZeRO-3", ("ranks", *columns, "messages", "gathers", "bytes told"), told),
        ],
        {"narrow": " ".join(NARROW)},
    )


def _cells(found: Found) -> list[str]:
    sizes = f"{found.peak / MIB:,.0f}", str(found.collectives), f"{found.sent / 1e6:,.1f}"
    return [f"{found.seconds:.2f}", *sizes]


def _over(made: Mapping[tuple[str, int, int], Found], layout: str, ranks: int) -> Spread:
    return Spread.of([made[layout, ranks, rank].seconds / made[layout, min(RANKS), rank].seconds for rank in (0, 1)])


def _one(value: float) -> Spread:
    return Spread.of([value])


if __name__ == "__main__":
    main_of("start", __doc__, run)
