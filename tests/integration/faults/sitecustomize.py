"""Breaks one process of a run at one moment; read by every Python that finds this folder on its path.

``OMNIVL_TEST_FAULT`` is JSON. For processes: ``moment``, ``stage`` and ``step`` (where the loop is then), ``victim``
(a rank), ``run`` (its folder), ``record`` (a file that gets the time and keeps the fault from happening twice) and
``action``: ``kill``, ``stop``, ``sleep`` (hang in Python), ``hold`` (hang while holding Python's lock), ``work`` (for
ten seconds) or ``fill`` (no file can grow beyond 4 KiB any more). For data: ``micro_steps``, a range of micro- batches,
and ``data``: ``spike`` (their steps report fifty times the loss), ``nan``, or ``absent`` (they are skipped). The engine
has no code for this.
"""

import ctypes
import hashlib
import json
import os
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("OMNIVL_TEST_FAULT", "{}"))
RANK = int(os.environ.get("RANK", "-1"))


def strike(heartbeats: pathlib.Path | None = None) -> None:
    """Breaks the victim: this process, or another one by the sign that it has left."""
    process = os.getpid()
    if FAULT["victim"] != RANK:
        assert heartbeats is not None, "only signs tell the number of another process"
        process = json.loads((heartbeats / f"rank-{FAULT['victim']:05d}.json").read_text())["process"]
    try:
        with pathlib.Path(FAULT["record"]).open("x") as file:
            json.dump({"time": time.time(), "process": process}, file)
    except FileExistsError:
        return
    if FAULT["action"] == "sleep":
        time.sleep(1e6)
    elif FAULT["action"] == "hold":
        ctypes.PyDLL(None).sleep(10**6)
    elif FAULT["action"] == "fill":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    elif FAULT["action"] == "work":
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
    else:
        os.kill(process, signal.SIGKILL if FAULT["action"] == "kill" else signal.SIGSTOP)


def wrapped(owner: Any, name: str, before: Callable[..., Any]) -> None:
    """Has ``before`` called with the arguments of a method first."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        before(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, call)


def arm() -> None:
    from engine.disk.run_folder import StageFolder
    from engine.watch.heartbeat import Heartbeat

    moment, here = FAULT["moment"], FAULT["victim"] == RANK
    now: list[Any] = ["", "", -1]

    def is_time(*activities: str) -> bool:
        return now[0] in activities and now[1:] == [FAULT["stage"], FAULT["step"]]

    def note(heartbeat: Heartbeat, activity: str, stage: str, step: int) -> None:
        now[:] = [activity, stage, step]
        if moment == "writing" and here and is_time("saving"):
            threading.Thread(target=strike_while_writing, daemon=True).start()
        begun = {"loading": is_time("loading data"), "saving": is_time("saving")}
        begun["starting"] = (activity, stage) == ("starting", FAULT["stage"])
        if here and begun.get(moment, False):
            strike()

    def strike_while_writing() -> None:
        stages = pathlib.Path(FAULT["run"]) / "stages"
        while not any(stages.glob(f"*-{FAULT['stage']}/checkpoints/*.tmp/host/*")):
            continue
        strike()

    wrapped(Heartbeat, "begin", note)
    if moment in ("forward", "backward") and here:
        from torch.nn.modules.module import register_module_forward_hook

        from omnivl.chain.chain import ChainLayer

        def behind_a_layer(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(module, ChainLayer) and is_time("step", "first step"):
                if moment == "forward":
                    strike()
                for _, tensor in output.items():
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: strike())

        register_module_forward_hook(behind_a_layer)
    if moment == "evaluation" and here:
        from omnivl.inference.encoder import Encoder

        wrapped(Encoder, "texts", lambda *_: strike() if is_time("evaluating") else None)
    if moment == "sealing" and RANK == 0:
        heartbeats = pathlib.Path(FAULT["run"]) / "heartbeats"

        def sealed(source: Any, target: Any, *_: Any, **named: Any) -> None:
            if pathlib.Path(source).match(f"*-{FAULT['stage']}/checkpoints/step-{FAULT['step']:06d}.tmp"):
                assert (pathlib.Path(source) / "manifest.json").is_file(), "the manifest comes first"
                strike(heartbeats)

        for owner in (os, pathlib.Path):
            wrapped(owner, "rename", sealed)
    if moment == "completing" and RANK == 0:
        wrapped(StageFolder, "mark_complete", lambda folder, steps: strike(folder.path.parents[1] / "heartbeats"))


def spoil() -> None:
    import dataclasses
    import math

    from engine.run.stage import Loader, StageLoop

    first, last = FAULT["micro_steps"]
    taken: list[bool] = []

    def noting(walk: Any) -> Any:
        def walk_on(loader: Loader) -> Any:
            for batch, state in walk(loader):
                spoilt = first < state.micro_step <= last
                if FAULT["data"] != "absent" or not spoilt:
                    taken.append(spoilt)
                    yield batch, state

        return walk_on

    def prepare_with(loop: Any, *arguments: Any, **named: Any) -> None:
        prepare(loop, *arguments, **named)
        step = loop._host.step

        def spoilt_step(batches: Any, number: int, *further: Any) -> Any:
            result, spoilt = step(batches, number, *further), any(taken)
            taken.clear()
            if not spoilt:
                return result
            if FAULT["data"] == "spike":
                return dataclasses.replace(result, loss=50 * result.loss)
            return dataclasses.replace(result, losses=dict.fromkeys(result.losses, math.nan), skipped=True)

        loop._host.step = spoilt_step

    prepare = StageLoop.__init__
    Loader.__iter__, Loader.places = noting(Loader.__iter__), noting(Loader.places)  # type: ignore[method-assign]
    StageLoop.__init__ = prepare_with  # type: ignore[method-assign]


if RANK >= 0 and "moment" in FAULT:
    arm()
if RANK >= 0 and "data" in FAULT:
    spoil()
