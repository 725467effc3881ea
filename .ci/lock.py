"""Writes and judges requirements.lock and requirements-dev.lock: SHA-256 of every file that `make install` may take.

python .ci/lock.py write     # after a change of requirements*.txt, on Linux with Python 3.11; through pip's own index
python .ci/lock.py covers    # exit code 0 where the locks hold files for this machine and Python

The locks hold everything that the requirements need, torch aside: its build differs between machines (CPU, CUDA, ROCm),
comes from other indexes, and brings libraries of its own. It is installed by version, after everything else.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
_BUILD = ("setuptools", "wheel")
"""What source distributions are built with."""
_NOT_LOCKED = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
_GLIBC = ("1", "2010", "2014", *(f"_2_{minor}" for minor in range(5, 32)))
_HEAD = """# SHA-256 of what {source} needs, torch aside, for Linux and Python {pythons}. Written by `make lock`.
"""

Entry = Mapping[str, Any]


def covers() -> bool:
    """Whether the locks hold files for this machine and Python."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    glibc = platform.libc_ver()[0] == "glibc"
    return sys.platform == "linux" and glibc and platform.machine() in MACHINES and python in PYTHONS


def write() -> None:
    """Writes both locks."""
    here = report(["-r", str(ROOT / "requirements.txt"), "-r", str(ROOT / "requirements-dev.txt"), *_BUILD])
    needed = {name_of(one) for one in report(["-r", str(ROOT / "requirements.txt"), *_BUILD])}
    versions = {name_of(one): one["metadata"]["version"] for one in here if not _NOT_LOCKED.fullmatch(name_of(one))}
    hashes = {name_of(one): {hash_of(one)} for one in here}
    wheels = [name_of(one) for one in here if file_of(one).endswith(".whl") and name_of(one) in versions]
    anywhere = {name_of(one) for one in here if file_of(one).endswith("-none-any.whl")}
    for machine in MACHINES:
        for python in PYTHONS:
            pins = [f"{name}=={versions[name]}" for name in wheels if name not in anywhere]
            for one in reports_of_other(pins, machine, python):
                hashes[name_of(one)].add(hash_of(one))
    for source, names in (("requirements", needed), ("requirements-dev", versions.keys() - needed)):
        lines = [_HEAD.format(source=f"{source}.txt", pythons=f"{PYTHONS[0]} to {PYTHONS[-1]}")]
        for name in sorted(names & versions.keys()):
            found = "".join(f" \\\n    --hash=sha256:{one}" for one in sorted(hashes[name]))
            lines.append(f"{name}=={versions[name]}{found}\n")
        (ROOT / f"{source}.lock").write_text("".join(lines), encoding="utf-8")


def report(arguments: Sequence[str]) -> list[Entry]:
    """What pip would install here.

    Raises:
        RuntimeError: It finds no such files; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(file), "--target", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return list(json.loads(file.read_text(encoding="utf-8"))["install"])


def reports_of_other(pins: Sequence[str], machine: str, python: str) -> list[Entry]:
    """What pip would install on another machine; what has no files for that is left out, and said."""
    left = list(pins)
    platforms = [option for glibc in _GLIBC for option in ("--platform", f"manylinux{glibc}_{machine}")]
    while left:
        try:
            return report(["--no-deps", "--only-binary", ":all:", "--python-version", python, *platforms, *left])
        except RuntimeError as error:
            missing = re.search(r"No matching distribution found for (\S+)", str(error))
            if missing is None or missing[1] not in left:
                raise
            print(f"{missing[1]}: no file for {machine}, Python {python}", file=sys.stderr)
            left.remove(missing[1])
    return []


def name_of(entry: Entry) -> str:
    """The name of a package, as indexes normalise it."""
    return re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()


def file_of(entry: Entry) -> str:
    """The name of its file."""
    return str(entry["download_info"]["url"]).rsplit("/", 1)[-1]


def hash_of(entry: Entry) -> str:
    """The SHA-256 of its file, hexadecimal."""
    return str(entry["download_info"]["archive_info"]["hashes"]["sha256"])


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:] == ["covers"]:
        sys.exit(not covers())
    else:
        sys.exit(__doc__)
