"""The table of records: steps for a CPU time, rows that replace earlier ones, the page; the peer's loss and cost."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import bare_clip, records
from benchmarks.bare_clip import BareCLIP, Settings, contrast, image_texts
from benchmarks.plan_runs import Finished, PlanRun, Spent, windows_of
from benchmarks.record import RESULTS, Options, write
from benchmarks.records import COLUMNS, RECORDS, RUNS, TUNING, page_of, run, steps_within
from omnivl.data.batch import Batch
from omnivl.tasks.results import Score

CPU = torch.device("cpu")


def test_windows_are_rates_times_steps() -> None:
    speed = {"seconds_per_step": 2.0, "cpu_seconds_per_step": 1.5, "samples_per_second": 128.0, "tflops": 0.25}
    lines = [{"step": 10, "speed": speed}, {"step": 12, "speed": {**speed, "cpu_seconds_per_step": 1.0}}]
    first, second = windows_of(lines)
    assert first == Spent(10, 15.0, 2560.0, 5e12)
    assert second == Spent(2, 2.0, 512.0, 1e12)
    assert Spent.over([first, second]) == Spent(12, 17.0, 3072.0, 6e12)


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [(10.0, 5.0, 110), (5.0, 5.0, 120), (4.0, 5.0, 120), (100.0, 5.0, 2)],  # 60 s; 0.5 s a step, and the first more
)
def test_steps_fill_the_time_that_the_first_ones_leave(first: float, second: float, steps: int) -> None:
    assert steps_within(60.0, Spent(10, first, 0, 0), Spent(10, second, 0, 0)) == steps


class Machine:
    """Answers in place of the runs: a plan's step takes half a CPU second, and recalls grow with the seconds."""

    def __init__(self, gain: float) -> None:
        self.gain, self.plans, self.peers = gain, [], []

    def run_plan(self, plan, overrides, cores, stages=()):
        values = dict(one.split("=", 1) for one in overrides)
        steps = int(values["stages.spatial.steps"])
        self.plans.append((int(values["seed"]), steps))
        if "stages.spatial.evaluate.tasks" in values:
            half = steps // 2
            return PlanRun(
                {}, 0, 0, {}, {"spatial": [Spent(half, half * 0.5 + 2, 0, 0), Spent(half, half * 0.5, 0, 0)]}
            )
        spent = Spent(steps, steps * 0.5 + 2, 256.0 * steps, steps * 1e12)
        value = self.gain * spent.cpu_seconds / 1e4 + 0.001 * int(values["seed"])
        scores = {
            f"unseen style image->text R@{k}": Score("unseen style", f"R@{k}", value * k, k / 1599, 0.3 + k / 100, 1599)
            for k in (1, 10)
        }
        return PlanRun({"spatial": scores}, 0, 0, {}, {"spatial": [spent]})

    def run_on(self, cores, command):
        seconds, rate = float(command[3]), float(next(one for one in command if "rate" in one).partition("=")[2])
        self.peers.append((seconds, rate))
        recall = seconds / 1e4 * (1.0 if rate == 6e-4 else 0.5)
        found = {"recalls": {"1": recall, "10": 10 * recall}, "pairs": 512, "seconds": seconds, "flops": 2e15}
        return Finished(json.dumps(found), 0.0, 0.0)


def make(monkeypatch: pytest.MonkeyPatch, machine: Machine, out: Path, *minutes: float) -> dict[str, list[list[str]]]:
    monkeypatch.setattr(records, "run_plan", machine.run_plan)
    monkeypatch.setattr(records, "run_on", machine.run_on)
    options = Options(CPU, 1, quick=False, out=out, own=Namespace(minutes=minutes, seeds=[0, 1, 2], tune=None))
    report = run(options)
    write(report, options, [], 0.0)
    assert [table.title for table in report.tables] == list(COLUMNS)
    for table in report.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    return {table.title: table.rows for table in report.tables}


def test_a_row_has_both_at_the_same_cpu_time_and_replaces_its_earlier_self(tmp_path, monkeypatch):
    machine = Machine(gain=1.0)
    first = make(monkeypatch, machine, tmp_path, 10, 1)
    assert sorted(machine.plans)[:4] == [(0, 30), (0, 30), (0, 116), (0, 1196)]  # 60 s less 2, at half a second
    tuned = [(180.0, one.learning_rate) for one in records.CANDIDATES]
    assert sorted(machine.peers) == sorted([*tuned, *[(60.0, 6e-4)] * 3, *[(600.0, 6e-4)] * 3])
    assert [row[-1] for row in first[TUNING]].count("taken") == 1
    assert [row[0] for row in first[RECORDS]] == ["1", "10"]
    assert [row[:3] for row in first[RUNS]][:2] == [["1", "0", "OmniVL"], ["1", "0", "bare CLIP"]]
    one = dict(zip(COLUMNS[RECORDS], first[RECORDS][0], strict=True))
    assert first[RECORDS][0][1:5] == [
        "0.00700 (0.00600 to 0.00800)",
        "0.0700 (0.0600 to 0.0800)",
        "0.00600 (0.00600 to 0.00600)",
        "0.0600 (0.0600 to 0.0600)",
    ]
    assert one["R@1, OmniVL / bare CLIP"] == "1.17 (1.00 to 1.33)"
    assert (one["16x16 pixels R@1, R@10"], one["chance"]) == ("0.310, 0.400", "0.000625, 0.00625")
    assert (one["CPU seconds"], one["pairs seen"], one["PFLOP"]) == ("60.0 (60.0 to 60.0)", "29,696", "0.116")

    better = Machine(gain=2.0)
    second = make(monkeypatch, better, tmp_path, 10)
    assert {seconds for seconds, _ in better.peers} == {600.0}
    assert len(better.peers) == 3, "settings are chosen once"
    assert second[RECORDS][0] == first[RECORDS][0]
    assert second[RECORDS][1][1] == "0.121 (0.120 to 0.122)"
    assert second[TUNING] == first[TUNING]
    found = json.loads((tmp_path / "records-cpu.json").read_text())
    assert [ratio["met"] for ratio in found["ratios"]] == [None, True]


def test_the_page_has_the_tables_and_says_what_was_missed(tmp_path, monkeypatch):
    make(monkeypatch, Machine(gain=1.0), tmp_path, 10)
    found = json.loads((tmp_path / "records-cpu.json").read_text())
    page = page_of(found)
    assert "**Missed: R@1 after 10 CPU minutes, OmniVL / bare CLIP is 1.02, not at least 1.5.**" in page
    for table in found["tables"]:
        assert f"## {table['title']}" in page
        assert "| " + " | ".join(table["rows"][0]) + " |" in page
    make(monkeypatch, Machine(gain=2.0), tmp_path, 10)
    assert "Missed" not in page_of(json.loads((tmp_path / "records-cpu.json").read_text()))


def test_the_page_of_the_repository_is_that_of_its_result() -> None:
    values = RESULTS / "records-cpu.json"
    if not values.is_file():
        pytest.skip("no row was made yet")
    assert records.PAGE.read_text("utf-8") == page_of(json.loads(values.read_text("utf-8")))


def pairs(identity: list[int]) -> Batch:
    """Random pixels, and texts of three and two tokens in turn."""
    count = len(identity)
    ids = torch.zeros(count, bare_clip.TEXT_LENGTH, dtype=torch.int64)
    for row in range(count):
        ids[row, : 3 - row % 2] = torch.tensor([1, 5 + row, 2][: 3 - row % 2])
    frames = torch.randint(0, 256, (count, 1, 3, 64, 64), dtype=torch.uint8)
    whose = torch.tensor(identity)
    return Batch("image_text", frames, ids, whose, whose, whose)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_peers_loss_is_clips_with_drawings_of_a_concept_as_positives(pooling) -> None:
    torch.manual_seed(0)
    model = BareCLIP(20, Settings(pooling=pooling, text_layers=1), torch.float32)
    batch = pairs([7, 8, 7])
    assert batch.frames is not None and batch.token_ids is not None
    with torch.no_grad():
        visual, text = model.encode_visual(batch.frames[:, 0]), model.encode_text(batch.token_ids)
    assert torch.allclose(visual.norm(dim=-1), torch.ones(3)) and torch.allclose(text.norm(dim=-1), torch.ones(3))
    logits = (visual @ text.T / 0.07).double()
    expected = 0.0
    for one in (logits, logits.T):
        logs = one.log_softmax(-1)
        expected -= float((logs[0, 0] + logs[0, 2]) / 2 + logs[1, 1] + (logs[2, 0] + logs[2, 2]) / 2) / 3 / 2
    assert math.isclose(contrast(model, batch).item(), expected, rel_tol=1e-4)


def test_padding_does_not_change_the_peers_text() -> None:
    model = BareCLIP(20, Settings(text_layers=1), torch.float32)
    long, short = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]]), torch.tensor([[1, 5, 2]])
    with torch.no_grad():
        assert torch.allclose(model.encode_text(long)[:1], model.encode_text(short), atol=1e-5)


def test_the_peers_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = BareCLIP(20, Settings(text_layers=2), torch.float32)
    batch = pairs([0, 1, 2, 3])
    assert batch.token_ids is not None and batch.frames is not None
    full = replace(batch, token_ids=batch.token_ids[::2].repeat(2, 1))  # without padding, which torch counts
    assert full.token_ids is not None
    counter = FlopCounterMode(display=False)
    with counter:
        contrast(model, full).backward()
    counted = counter.get_total_flops() - 3 * 2 * 4 * 4 * bare_clip.EMBEDDING  # the loss's similarities
    pixels = 2 * 4 * 64**2 * 3 * bare_clip.WIDTH  # no gradient of pixels is computed, which the count includes
    assert math.isclose(model.flops(full.token_ids), counted + pixels, rel_tol=1e-3)


def test_the_peer_sees_the_plans_pictures_and_styles() -> None:
    (entry,) = image_texts(bare_clip.PLAN)
    assert entry.source == "emoji_hands" and len(entry.where["style"]) == 7 and "twemoji" not in entry.where["style"]
    assert entry.augment.crop_scale == (0.8, 1.0)


@pytest.mark.full
def test_the_peer_trains_for_the_time_it_is_given() -> None:
    train = partial(bare_clip.train_bare_clip, image_texts(bare_clip.PLAN), seed=0, cpu=True)
    _, training = train(seconds=3.0, settings=Settings(batch_size=32, text_layers=1))
    assert 3.0 <= training.seconds < 6.0
    assert training.pairs % 32 == 0 and training.pairs > 0 and training.flops > 0
