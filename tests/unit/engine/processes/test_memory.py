"""Freed memory is kept: steps after the first ones get no pages from the system."""

import os
import subprocess
import sys

import pytest
import torch

from engine.processes.memory import keep_freed_memory

MEGABYTES, STEPS = (48, 40, 33, 12, 50), 4
PAGES = STEPS * sum(MEGABYTES) * (1 << 20) // os.sysconf("SC_PAGE_SIZE")
PROBE = f"""
import resource, sys, torch
from engine.processes.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return len([torch.ones(megabytes << 18) for megabytes in {MEGABYTES}])
for _ in range({STEPS}):
    step()
before = faults()
for _ in range({STEPS}):
    step()
print(int(kept), faults() - before)
"""


def probed(choice: str) -> tuple[int, int]:
    """Whether glibc has taken it, and the page faults of steps whose tensors are all freed at their end."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC", "THP"))}
    command = [sys.executable, "-c", PROBE, choice]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    return kept, faults


def test_later_steps_get_no_pages_from_the_system() -> None:
    kept, faults = probed("keep")
    if not kept:
        pytest.skip("not glibc")
    if probed("leave")[1] < PAGES // 2:
        pytest.skip("huge pages hide what is given back")
    assert faults < PAGES // 4


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "65536"},
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"},
    ],
)
def test_who_sets_the_allocator_keeps_it(variables: dict[str, str]) -> None:
    assert not keep_freed_memory(torch.device("cpu"), variables)


def test_nothing_changes_beside_an_accelerator() -> None:
    assert not keep_freed_memory(torch.device("cuda", 0), {})
