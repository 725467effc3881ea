"""The locks hold everything that the requirements need, with hashes."""

import importlib.util
import re
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("requirements", "requirements-dev")


@pytest.fixture(scope="module")
def lock() -> Any:
    """.ci/lock.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by name."""
    text = (ROOT / f"{name}.lock").read_text().replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            package, version = pin.split("==")
            found[package] = version, hashes
    return found


def pinned(name: str) -> dict[str, str]:
    lines = [line.split(";")[0].strip() for line in (ROOT / f"{name}.txt").read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(package): version for package, version in pins}


@pytest.mark.parametrize("name", NAMES)
def test_a_lock_has_every_pin_with_its_version(name: str) -> None:
    pins, lines = pinned(name), locked(name)
    pins.pop("torch", None)
    assert pins.items() <= {package: version for package, (version, _) in lines.items()}.items(), "make lock"


def test_every_line_has_hashes_and_names_no_place() -> None:
    for name in NAMES:
        assert locked(name)
        for package, (_, hashes) in locked(name).items():
            assert hashes, package
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), package
        assert "://" not in (ROOT / f"{name}.lock").read_text()


def test_what_locked_packages_need_is_locked_too(lock: Any) -> None:
    """Nothing is resolved when a lock is installed, so that it has to be complete."""
    packaging = pytest.importorskip("packaging.requirements")
    known = locked("requirements") | locked("requirements-dev")
    for package in known:
        try:
            needs = distribution(package).requires or []
        except PackageNotFoundError:  # of another system
            continue
        for text in needs:
            need = packaging.Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                name = normal(need.name)
                assert name in known or lock._NOT_LOCKED.fullmatch(name), f"{package} needs {need}"


def test_nothing_of_torch_is_locked(lock: Any) -> None:
    """Its build and its libraries differ between machines."""
    for name in ("torch", "triton", "nvidia-cublas-cu12", "cuda-bindings"):
        assert lock._NOT_LOCKED.fullmatch(name)
    assert not any(lock._NOT_LOCKED.fullmatch(name) for name in locked("requirements") | locked("requirements-dev"))


@pytest.mark.parametrize(
    ("system", "machine", "glibc", "version", "covered"),
    [
        ("linux", "x86_64", "glibc", (3, 11, 7), True),
        ("linux", "aarch64", "glibc", (3, 13, 0), True),
        ("linux", "x86_64", "", (3, 11, 7), False),
        ("linux", "riscv64", "glibc", (3, 11, 7), False),
        ("darwin", "x86_64", "", (3, 11, 7), False),
        ("linux", "x86_64", "glibc", (3, 15, 0), False),
    ],
)
def test_locks_are_taken_where_they_hold_the_files(
    lock: Any,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    machine: str,
    glibc: str,
    version: tuple[int, int, int],
    covered: bool,
) -> None:
    class Version:
        major, minor, micro = version

    monkeypatch.setattr(lock.sys, "platform", system)
    monkeypatch.setattr(lock.sys, "version_info", Version)
    monkeypatch.setattr(lock.platform, "machine", lambda: machine)
    monkeypatch.setattr(lock.platform, "libc_ver", lambda: (glibc, "2.36"))
    assert lock.covers() == covered


def made(*arguments: str) -> str:
    """What make would do."""
    done = subprocess.run(["make", "-n", "-B", "install-dev", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_takes_hashes_unless_told_otherwise() -> None:
    for name in NAMES:
        assert f"--require-hashes -r {name}.lock" in made()
    assert 'if [ -n "" ]' in made("LOCK=")
    assert "pip install --quiet torch" not in made("TORCH=")
