"""Limits of tests grow with the load of the machine, and what hangs still ends."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import patience
import pytest

TESTS = Path(__file__).parents[1]
ENDLESS = "print(flush=True)\nwhile True: pass"
CLOCKS = ("time.monotonic()", "time.time()", "time.perf_counter()")
SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has nothing else to do."""
    slowness(monkeypatch, 1.0)


def slowness(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """The factors that are found, one after the other; the last one stays."""
    left = list(values)
    monkeypatch.setattr(patience, "factor", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_the_factor_grows_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes that compute share one core with the one that looks."""
    monkeypatch.setattr(patience.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(patience, "_LOOKS", 40)
    cores = os.sched_getaffinity(0)
    others: list[subprocess.Popen[bytes]] = []
    try:
        os.sched_setaffinity(0, {min(cores)})
        for _ in range(3):
            others.append(subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE))
        for process in others:
            assert process.stdout is not None
            process.stdout.readline()  # it computes from now on
        began = time.thread_time()
        patience._work()
        monkeypatch.setattr(patience, "REFERENCE_SECONDS", time.thread_time() - began)
        busy = patience._look()
    finally:
        os.sched_setaffinity(0, cores)
        for process in others:
            process.kill()
            process.communicate()
    assert 2 < busy <= patience.MOST


def test_the_factor_counts_the_processes_that_wait_for_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REFERENCE_SECONDS", 1e6)
    monkeypatch.setattr(patience.os, "sched_getaffinity", lambda _: {0, 1})
    for load, found in ((0.5, 1.0), (6.0, 3.0), (1000.0, patience.MOST)):
        monkeypatch.setattr(patience.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert patience._look() == found


def test_a_slow_machine_has_a_bounded_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REFERENCE_SECONDS", 1e-9)
    assert patience._look() == patience.MOST


def test_a_limit_that_is_reached_grows_with_the_load_of_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    slowness(monkeypatch, 1.0, 3.0)
    limit = patience.Limit(10)
    now[0] = 109
    assert limit.left() == 1
    now[0] = 111
    assert limit.left() == 19
    now[0] = 130
    assert limit.passed()


def test_processes_get_the_time_that_a_busy_machine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    slowness(monkeypatch, 1.0, 100.0)
    code = "import sys, time; print('a', flush=True); time.sleep(0.5); print('b'); sys.exit(3)"
    done = patience.run([sys.executable, "-c", code], limit=0.1, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "a\nb\n")


@pytest.mark.usefixtures("calm")
def test_what_hangs_ends() -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        patience.run(SLEEPER, limit=0.2)
    with subprocess.Popen(SLEEPER) as process:
        for waiting in (patience.wait, patience.communicate):
            with pytest.raises(subprocess.TimeoutExpired):
                waiting(process, 0.2)
        process.kill()
    with pytest.raises(AssertionError, match="the end of the world: not within"):
        patience.wait_for(lambda: False, 0.1, "the end of the world")
    assert time.monotonic() - began < 30


def test_a_failure_of_a_process_is_raised_where_it_is_asked_for() -> None:
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    assert patience.run(command, limit=60).returncode == 4
    with pytest.raises(subprocess.CalledProcessError):
        patience.run(command, limit=60, check=True)


HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
import patience, pytest

found = {found}
patience.factor = lambda: found.pop(0) if len(found) > 1 else found[0]

def pytest_timeout_set_timer(item, settings):
    return patience.set_timer(item, settings)
"""


@pytest.mark.parametrize(("found", "passes"), [([1.0], False), ([1.0, 100.0], True), ([4.0], True)])
def test_limits_of_pytest_grow_too(tmp_path: Path, found: list[float], passes: bool) -> None:
    (tmp_path / "conftest.py").write_text(HANGING.format(tests=str(TESTS), found=found))
    (tmp_path / "test_it.py").write_text("import time\ndef test_it():\n    time.sleep(1.5)\n")
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=0.5", "-p", "no:cacheprovider", str(tmp_path)]
    done = patience.run(command, limit=60, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode == 0) == passes, done.stdout
    assert ("Timeout" in done.stdout) != passes


def test_the_tests_here_have_the_growing_timer(request: pytest.FixtureRequest) -> None:
    hooks = request.config.hook.pytest_timeout_set_timer.get_hookimpls()
    assert hooks[-1].function.__module__.endswith("conftest"), "the last one is called first"


def bare_limits(tree: ast.AST) -> Iterator[int]:
    """Lines with a limit in seconds that do not grow: ``timeout=60``, ``time.monotonic() + 60``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("timeout", "timeout_s"):
            called = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("patience.")
            if not called:
                yield node.value.lineno
        elif (isinstance(node, ast.arg) and node.arg == "timeout") or (
            isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and ast.unparse(node.left) in CLOCKS
        ):
            yield node.lineno


def test_no_limit_of_a_test_is_a_bare_number() -> None:
    places = [
        f"{file.relative_to(TESTS)}:{line}"
        for file in sorted(TESTS.rglob("*.py"))
        # The clock itself, and a fault that lasts for some seconds.
        if file.name not in ("patience.py", "sitecustomize.py")
        for line in bare_limits(ast.parse(file.read_text()))
    ]
    assert not places, f"take patience.run, patience.communicate, patience.Limit or patience.seconds: {places}"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("subprocess.run(x, timeout=60)", [1]),
        ("process.wait(timeout=LIMIT)", [1]),
        ("end = time.monotonic() + 60", [1]),
        ("def run(x, timeout=60): ...", [1]),
        ("Barrier(2, timeout=patience.seconds(60))", []),
        ("patience.run(x, limit=60)", []),
    ],
)
def test_bare_limits_are_found(code: str, lines: list[int]) -> None:
    assert list(bare_limits(ast.parse(code))) == lines
