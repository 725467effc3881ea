"""Messages between processes: every kind arrives as it was sent, and nothing else is taken."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.disk.rollback import Rollback
from engine.hosts.base import WeightsReport
from engine.hosts.shards import Records
from engine.plan.parallel import Precision
from engine.processes import messages
from engine.processes.messages import MessageError, pack, unpack

ROLLBACK = Rollback(3, 7, "loss is nan", ({"micro_step": 4, "shards": {"a": [0, 1.5]}}, {"micro_step": 2}))
VALUES = [
    (None, None),
    (True, bool),
    (-(1 << 63), int),
    ("é\udcff\u2028", str),
    ("bf16", Precision),
    (0.1 + 0.2, float),
    (float("inf"), float),
    ([1, 2], list[int]),
    ((None, ()), tuple[Path | None, tuple[Rollback, ...]]),
    ((Path("a\udcff/step-3"), (ROLLBACK, ROLLBACK)), tuple[Path | None, tuple[Rollback, ...]]),
    (({"event": "evaluation", "scores": {"r": 0.5}}, 12), tuple[dict[str, Any], int] | None),
    (None, tuple[dict[str, Any], int] | None),
    (("fp32", {"spatial": "bf16"}), tuple[Precision, dict[str, Precision]] | None),
    ((None, {"host/shard-0": [{"bytes": 1, "sha256": "ab"}]}), tuple[str | None, Records]),
    ((WeightsReport(("a",), (), ("b",)), None), tuple[WeightsReport | None, str | None]),
]


@pytest.mark.parametrize(("value", "kind"), VALUES)
def test_arrives_as_it_was_sent(value: Any, kind: Any) -> None:
    got = unpack(pack(value, kind), kind)
    assert got == value
    assert type(got) is type(value)


def test_a_float_that_is_no_number_arrives() -> None:
    assert math.isnan(unpack(pack(float("nan"), float), float))


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (1, str, "value: got int '1'; allowed is str"),
        (True, int, "value: got bool 'True'; allowed is an integer of 64 bits"),
        (1 << 63, int, "allowed is an integer of 64 bits"),
        ("fp64", Precision, r"allowed is \('auto', 'fp32', 'bf16'\)"),
        ((1, 2, 3), tuple[int, int], "allowed is 2 values"),
        ({1: 2}, Mapping[str, Any], "allowed is a mapping"),
        ({"a": [object()]}, Mapping[str, Any], r"value.a\[0\]: got object"),
        ({"bytes": 1}, Records, "value.bytes: got int"),
        ({"a": [{"bytes": 1}]}, Records, r"value.a\[0\]: got dict .* allowed is the fields bytes, sha256"),
        ("text", Rollback, "allowed is Rollback"),
    ],
)
def test_what_is_of_another_kind_is_not_sent(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(MessageError, match=said):
        pack(value, kind)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        b'{"a": 1, "a": 2}',
        b'{"__class__": "os.system", "first_bad": 1}',
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"first_bad":1,"step":2,"reason":"x","loaders":[],"more":1}',
        b'{"first_bad":1.0,"step":2,"reason":"x","loaders":[]}',
        b'{"first_bad":1,"step":2,"reason":"x","loaders":[3]}',
    ],
)
def test_what_is_of_another_kind_is_not_taken(content: bytes) -> None:
    with pytest.raises(MessageError):
        unpack(content, Rollback)


def test_damaged_messages_are_taken_rightly_or_refused() -> None:
    draw = random.Random(0)
    kind = tuple[Path | None, tuple[Rollback, ...]]
    whole = pack((Path("a"), (ROLLBACK,)), kind)
    for _ in range(5000):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.choice(b'0"[]{},:.-eNaN\\u\xff\x00')
        try:
            path, rollbacks = unpack(bytes(content[: draw.randint(1, len(content))]), kind)
        except MessageError:
            continue
        assert path is None or isinstance(path, Path)
        assert all(isinstance(one, Rollback) and type(one.step) is int for one in rollbacks)


def test_a_message_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LARGEST", 100)
    assert len(pack("x" * 98, str)) == 100
    with pytest.raises(MessageError, match="got 101 bytes; allowed are 100"):
        pack("x" * 99, str)


def test_messages_are_json() -> None:
    assert json.loads(pack(ROLLBACK, Rollback))["first_bad"] == 3
