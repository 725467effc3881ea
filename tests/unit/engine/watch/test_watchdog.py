"""Signs of life and the verdict on them; whole runs that hang are in tests/integration/test_faults.py."""

import dataclasses
import hashlib
import threading
import time
from pathlib import Path

import patience
import pytest

from engine.watch.heartbeat import Heartbeat, Pulse, Sign, read_sign, sign_file, write_sign
from engine.watch.watchdog import verdict, watched

SIGN = Sign(0, "elsewhere", 4711, 3, 9, "step", "joint", 4, 12.0, True, "engine/hosts/plain.py:73 in step")


def signs(*changes: dict[str, object]) -> list[Sign | None]:
    return [dataclasses.replace(SIGN, rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


def test_a_sign_is_read_back_and_half_of_one_is_none(tmp_path: Path) -> None:
    write_sign(tmp_path, SIGN)
    write_sign(tmp_path, dataclasses.replace(SIGN, where="x"))
    assert read_sign(tmp_path, 0) == dataclasses.replace(SIGN, where="x")
    assert read_sign(tmp_path, 1) is None
    sign_file(tmp_path, 0).write_bytes(sign_file(tmp_path, 0).read_bytes()[:60])
    assert read_sign(tmp_path, 0) is None


def test_idle_is_counted_from_the_last_thing_begun() -> None:
    heartbeat = Heartbeat()
    pulse = Pulse(heartbeat, 2, 5.0)
    found = []
    for activity in ("loading data", None, None, "step", None):
        if activity is not None:
            heartbeat.begin(activity, "joint", 7)  # type: ignore[arg-type]
        found.append(pulse.sign())
    assert [sign.idle for sign in found] == [0, 5, 10, 0, 5]
    assert [sign.beat for sign in found] == [1, 2, 3, 4, 5]
    assert (found[-1].rank, found[-1].stage, found[-1].step, found[-1].activity) == (2, "joint", 7, "step")
    assert not found[-1].waiting


@pytest.mark.parametrize(("activity", "moves"), [("evaluating", True), ("step", False)])
def test_code_that_moves_is_progress_where_it_may_take_long(activity: str, moves: bool) -> None:
    heartbeat = Heartbeat()
    heartbeat.begin(activity, "joint", 7)  # type: ignore[arg-type]
    pulse = Pulse(heartbeat, 0, 5.0)
    pulse.sign()
    elsewhere = pulse.sign()  # from another line
    assert elsewhere.idle == (0 if moves else 5)
    still = [pulse.sign() for _ in range(3)]  # from one line
    assert still[-1].idle == (10 if moves else 20)


def test_computing_within_one_call_is_progress_where_it_may_take_long() -> None:
    heartbeat = Heartbeat()
    heartbeat.begin("saving", "joint", 7)
    pulse = Pulse(heartbeat, 0, 0.2)
    found: list[Sign] = []

    def look() -> None:
        for _ in range(6):
            found.append(pulse.sign())
            time.sleep(0.2)

    looking = threading.Thread(target=look)
    looking.start()
    while looking.is_alive():
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    assert found[-1].idle < patience.seconds(1), "of five looks at one line"


def test_who_gives_no_sign_of_life_is_to_blame(tmp_path: Path) -> None:
    here = signs({}, {"waiting": False}, {})
    assert verdict(here, [2], 10.0, tmp_path) == (
        "nothing has moved for 10 s, which is guard.hang_seconds\n"
        "  rank 2 (process 4711 on elsewhere) gives no sign of life; last seen in stage joint, after step 4 (step), at "
        "engine/hosts/plain.py:73 in step, waiting for other processes\n"
        "  waiting for it: rank 0, 1, stage joint, after step 4 (step), at engine/hosts/plain.py:73 in step, waiting "
        "for other processes\n"
        f"stack traces of all ranks: {tmp_path}; the same command goes on from the newest whole checkpoint"
    )
    assert "rank 1 has never given a sign of life" in verdict([SIGN, None], [1], 10.0, tmp_path)


def test_else_who_does_not_wait_for_others(tmp_path: Path) -> None:
    text = verdict(signs({}, {"waiting": False, "where": "omnivl/data/loader.py:9 in f"}), [], 10.0, tmp_path)
    assert "\n  rank 1 (process 4711 on elsewhere) hangs: stage joint, after step 4 (step), at omnivl/data/" in text
    assert "\n  rank 0" not in text


def test_else_who_is_behind(tmp_path: Path) -> None:
    text = verdict(signs({}, {"number": 8, "activity": "loading data"}, {}), [], 10.0, tmp_path)
    assert "\n  rank 1 (process 4711 on elsewhere) hangs: stage joint, after step 4 (loading data)" in text
    assert "waiting for it: rank 0, 2," in text


def test_else_nobody_stands_out_and_all_are_shown(tmp_path: Path) -> None:
    text = verdict(signs({}, {}), [], 10.0, tmp_path)
    assert "; all wait for each other, and no rank stands out\n  rank 0 (" in text
    assert "\n  rank 1 (" in text


def test_a_process_that_is_gone_or_stopped_is_said_to_be(tmp_path: Path) -> None:
    import socket

    gone = signs({"host": socket.gethostname(), "process": 2**22 + 1})
    assert "gives no sign of life: it is gone; last seen" in verdict(gone, [0], 10.0, tmp_path)


def test_a_watched_block_leaves_signs_and_ends_its_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with watched(tmp_path / "signs", tmp_path / "hangs", 5.0) as heartbeat:
        heartbeat.begin("step", "joint", 7)
        limit = patience.Limit(20)
        while (sign := read_sign(tmp_path / "signs", 0)) is None or sign.step != 7:
            assert not limit.passed()
            time.sleep(0.01)
    assert threading.active_count() == before
    with watched(tmp_path / "none", tmp_path / "hangs", 0):
        assert threading.active_count() == before
    assert not (tmp_path / "none").exists()
