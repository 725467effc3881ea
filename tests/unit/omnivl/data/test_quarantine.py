import json
import os

import pytest

from omnivl.data.config import DataEntryConfig
from omnivl.data.quarantine import Quarantine
from omnivl.data.sources import open_source
from omnivl.data.sources.base import Rejection
from omnivl.errors import DataError
from omnivl.shown import printable


def bad(number: int, cause: str = "broken_image") -> Rejection:
    return Rejection(cause, f"s.tar:{number}", "why")


def make(log=None, fraction: float = 0.1, least: int = 10) -> Quarantine:
    return Quarantine(max_bad_fraction=fraction, min_samples_to_judge=least, log=log)


def test_the_message_by_hand():
    quarantine = make()
    quarantine.record(8, [])
    quarantine.record(8, [bad(0)])  # 1 of 17: 5.9 %
    quarantine.record(2, [bad(1, "broken_video")])  # 2 of 20: 10.0 %
    with pytest.raises(DataError) as error:
        quarantine.record(0, [bad(2)])
    assert str(error.value) == (
        "data: 3 of 21 samples read are bad (14.3%); allowed: 10.0% (max_bad_fraction). Causes: broken_image 2, "
        "broken_video 1; the last one: s.tar:2: why; no log is kept. Mend or remove them, or raise max_bad_fraction"
    )


def test_the_share_itself_is_allowed():
    quarantine = make()
    quarantine.record(9, [bad(0)])  # 1 of 10 is 10 %, and 10 % is allowed
    assert quarantine.counts == {"broken_image": 1}
    assert quarantine.seen == 10


def test_nothing_is_judged_before_enough_was_seen():
    quarantine = make()
    quarantine.record(1, [bad(number) for number in range(8)])
    with pytest.raises(DataError, match="9 of 10 samples read are bad"):
        quarantine.record(0, [bad(8)])


def test_a_good_batch_never_stops_a_run():
    quarantine = make(fraction=0.0)
    quarantine.record(4, [bad(0)])
    quarantine.record(100, [])
    assert quarantine.seen == 105


def test_the_log_is_appended_to_and_names_each_sample_once(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"
    for _ in range(2):
        quarantine = make(log, fraction=1.0)
        quarantine.record(1, [bad(0), bad(0), bad(1)])
        quarantine.record(1, [bad(1)])
        assert quarantine.counts == {"broken_image": 4}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[:2] == [{"cause": "broken_image", "where": f"s.tar:{n}", "detail": "why"} for n in range(2)]
    assert len(lines) == 4, "two runs"


def test_sources_are_judged_by_shards_and_samples_apart(tmp_path):
    quarantine = make(tmp_path / "log.jsonl")
    quarantine.record_source("a", 95, 20, [bad(0), bad(1, "truncated_tar")], log=False)
    assert not (tmp_path / "log.jsonl").exists(), "another replica writes it"
    with pytest.raises(DataError, match=r"^data source 'b': 3 of 20 shards are bad \(15\.0%\)"):
        quarantine.record_source("b", 1000, 20, [bad(number, "empty_shard") for number in range(3)])
    with pytest.raises(DataError, match=r"^data source 'c': 12 of 100 samples are bad \(12\.0%\)"):
        quarantine.record_source("c", 88, 20, [bad(number) for number in range(12)])


NAMES = (b"\xff\xfe.tar", b"\xe9t\xe9.tar", "d\u2028e.tar".encode(), b"new\nline.tar", "\u00e9t\u00e9.tar".encode())


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_are_no_utf8_are_logged_so_that_the_file_can_be_found(name, write_tar, png, tmp_path):
    path = os.fsencode(tmp_path) + b"/" + name
    write_tar([("a.png", png), ("a.json", b"{"), ("b.png", png), ("b.txt", b"b")]).rename(os.fsdecode(path))
    source = open_source(DataEntryConfig(os.fsdecode(path), "image_text"), seed=0)
    log = tmp_path / "log.jsonl"
    quarantine = make(log, fraction=1.0)
    quarantine.record_source("s", len(source), 1, source.rejections)
    (line,) = log.read_bytes().decode("utf-8").split("\n")[:-1]
    shard, _, key = json.loads(line)["where"].rpartition(":")
    assert (os.fsencode(shard), key) == (path, "a")
    assert os.path.exists(shard)  # noqa: PTH110  # the name as it is
    assert printable(line).encode("utf-8")
