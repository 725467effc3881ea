"""The name by which processes know that they run on one machine."""

from pathlib import Path

import pytest

from engine.processes import machine as module
from engine.processes.machine import machine


def test_a_machine_is_told_from_another_one_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node")
    found = []
    for boot in ("1234\n", "5678\n", None):
        file = tmp_path / f"boot of {boot}"
        if boot is not None:
            file.write_text(boot)
        monkeypatch.setattr(module, "_BOOT", file)
        found.append(machine())
    assert found == ["node 1234", "node 5678", "node"]


def test_it_stays_the_same() -> None:
    assert machine() == machine() != ""
