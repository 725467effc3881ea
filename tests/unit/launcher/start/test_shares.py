"""How a machine is cut for several runs at once."""

import pytest

from launcher.start import shares


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, cores: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(shares, "usable_cores", lambda: cores)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_no_gpu_is_in_two_shares_while_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=5, cores=16)
    assert [(share.gpus, share.cores) for share in shares.share_machine(2)] == [(["0", "2", "4"], 8), (["1", "3"], 8)]
    assert [share.gpus for share in shares.share_machine(7)] == [["0"], ["1"], ["2"], ["3"], ["4"], ["0"], ["1"]]


def test_only_gpus_that_the_caller_may_use_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2, cores=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    first, second = shares.share_machine(2)
    assert (first.environment(1)["CUDA_VISIBLE_DEVICES"], second.gpus) == ("3", ["GPU-7"])


def test_threads_of_all_runs_together_are_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=0, cores=8)
    share = shares.share_machine(2)[0]
    assert [share.environment(processes)["OMP_NUM_THREADS"] for processes in (1, 2, 9)] == ["4", "2", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in share.environment(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share.environment(2)["OMP_NUM_THREADS"] == "3"
