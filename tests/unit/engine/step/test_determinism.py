from typing import Any

import pytest
import torch

from engine.step.determinism import deterministic_operations


def settings() -> tuple[bool, bool, bool]:
    memory: Any = torch.utils.deterministic
    fills = bool(memory.fill_uninitialized_memory)
    return torch.are_deterministic_algorithms_enabled(), fills, torch.backends.cudnn.benchmark


def test_settings_hold_within_the_block_and_come_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic_operations(True):
        assert settings() == (True, False, False)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), deterministic_operations(True):
        _ = 1 / 0
    assert settings() == before == (False, True, True)
    with deterministic_operations(False):
        assert settings() == before


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    """``put_`` without accumulation over equal places has none anywhere."""
    with deterministic_operations(True), pytest.warns(UserWarning, match="put_"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
