"""Damages files of a finished run, one at a time, and has commands read it.

A program of its own: what waits for ever is ended by an alarm, memory is bounded, and the right of root to read
everything is laid down.

python tests/integration/replaced_files.py RUN SEED COUNT     # RUN: folder of a run of test_damage.py, beside its plan

Prints as JSON what went wrong: an error other than ``UserError``, one that does not name the file, other weights.
"""

import contextlib
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launcher.cli import app
from launcher.start.worker import run_worker
from omnivl.errors import UserError

SECONDS = 90
"""After which a command counts as waiting for ever."""
MEMORY = 9 << 30
STAGES = ("01-first", "02-second")
JSON = (
    "{}",
    "[]",
    "null",
    "1",
    '"x"',
    "[[]]",
    '{"step": 1}',
    '{"steps": 1e999}',
    '{"steps": true}',
    '{"results": [{}]}',
)

Damage = Callable[[Path, Path, random.Random], object]
"""Damages a file; gets another file of the run, and where to draw from."""


def _flip(file: Path, other: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _swap(file: Path, other: Path, draw: random.Random) -> None:
    mine, its = file.read_bytes(), other.read_bytes()
    file.write_bytes(its)
    other.write_bytes(mine)


def _in_its_place(make: Callable[[Path], object]) -> Damage:
    def replace(file: Path, other: Path, draw: random.Random) -> None:
        file.unlink()
        make(file)

    return replace


def _full_folder(place: Path) -> None:
    (place / "inner").mkdir(parents=True)


DAMAGES: dict[str, Damage] = {
    "cut": lambda file, _, draw: file.write_bytes(file.read_bytes()[: draw.randrange(max(1, file.stat().st_size))]),
    "emptied": lambda file, *_: file.write_bytes(b""),
    "flipped": _flip,
    "other bytes": lambda file, _, draw: file.write_bytes(draw.randbytes(file.stat().st_size)),
    "other JSON": lambda file, _, draw: file.write_text(draw.choice(JSON)),
    "deleted": lambda file, *_: file.unlink(),
    "swapped": _swap,
    "a folder": _in_its_place(lambda file: file.mkdir()),
    "a full folder": _in_its_place(_full_folder),
    "a link to nowhere": _in_its_place(lambda file: file.symlink_to("/nowhere/at/all")),
    "a link to itself": _in_its_place(lambda file: file.symlink_to(file.name)),
    "a link to a folder": _in_its_place(lambda file: file.symlink_to("/tmp")),
    "a link to nothing": _in_its_place(lambda file: file.symlink_to("/dev/null")),
    "a link to zeros": _in_its_place(lambda file: file.symlink_to("/dev/zero")),
    "a pipe": _in_its_place(os.mkfifo),
    "unreadable": lambda file, *_: file.chmod(0),
}
READERS = (("report",), ("checkpoint", "verify"), ("checkpoint", "inspect"), ("checkpoint", "convert"))


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class _Rights(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def as_anybody() -> Iterator[None]:
    """Without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root reads what nobody may read."""
    system, header, rights = ctypes.CDLL(None), _Header(0x20080522, 0), (_Rights * 2)()
    assert system.capget(ctypes.byref(header), rights) == 0
    before = rights[0].effective
    rights[0].effective &= ~0b110
    assert system.capset(ctypes.byref(header), rights) == 0
    try:
        yield
    finally:
        rights[0].effective = before
        assert system.capset(ctypes.byref(header), rights) == 0


def go_back(run: Path, how: str) -> None:
    """Takes from a finished run what a start then has to do again."""
    first, second = (run / "stages" / stage for stage in STAGES)
    if how == "within the second stage":
        (second / "complete.json").unlink()
    if how in ("before the second stage", "within the first stage"):
        shutil.rmtree(second)
    if how == "within the first stage":
        (first / "complete.json").unlink()
        shutil.rmtree(max((first / "checkpoints").iterdir()))


STARTS = ("finished", "within the second stage", "before the second stage", "within the first stage")


def weights_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {stage: load_file(run / "stages" / stage / "weights.safetensors") for stage in STAGES}


def carry_out(run: Path, command: tuple[str, ...]) -> None:
    """A command on a run; raises what the command raises."""
    if command == ("pretrain",):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert run_worker(["--run-folder", str(run), "--", str(run.parent / "plan.yaml")]) == 0
        return
    more = ("--out", str(run.parent / "out.safetensors")) if command[-1] == "convert" else ()
    result = CliRunner().invoke(app, [*command, str(run), *more])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


def try_one(whole: Path, run: Path, draw: random.Random, weights: dict[str, Any]) -> Iterator[str]:
    """Damages a copy of a run in one way; yields what goes wrong."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    trains = draw.random() < 0.5
    how = draw.choice(STARTS) if trains else "finished"
    go_back(run, how)
    files = [file for file in sorted(run.rglob("*")) if file.is_file()]
    small = [file for file in files if "checkpoints" not in file.parts]
    file = draw.choice(small if draw.random() < 0.6 else files)
    other = draw.choice([one for one in files if one != file])
    kind = draw.choice(sorted(DAMAGES))
    DAMAGES[kind](file, other, draw)
    touched = (file, other) if kind == "swapped" else (file,)
    for command in (("pretrain",),) if trains else READERS:
        what = f"{' '.join(command)}, {how}, {file.relative_to(run)}: {kind} (with {other.relative_to(run)})"
        signal.alarm(SECONDS)
        try:
            with as_anybody():
                carry_out(run, command)
                found = (
                    {}
                    if not trains
                    else {
                        stage: load_file(path)
                        for stage in STAGES
                        if (path := run / "stages" / stage / "weights.safetensors") not in touched
                    }
                )
        except UserError as error:
            if not any(one.name in str(error) for one in touched):
                yield f"{what}: does not name it: {error}"
        except Exception as error:
            yield f"{what}: {type(error).__name__}: {error}"
        else:
            for stage, tensors in found.items():
                if not all(torch.equal(tensors[name], tensor) for name, tensor in weights[stage].items()):
                    yield f"{what}: other weights of {stage}"
        finally:
            signal.alarm(0)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"nothing within {SECONDS} s")


def main(whole: Path, seed: int, count: int) -> None:
    signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    draw, weights, wrong = random.Random(seed), weights_of(whole), []
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(whole.parent / "plan.yaml", folder)
        for number in range(count):
            wrong += [f"{number}: {one}" for one in try_one(whole, Path(folder) / "run", draw, weights)]
    print(json.dumps(wrong, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
