import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.telemetry.metrics import MetricsLog, bytes_up_to, read_metrics
from omnivl.data.batch import Batch


def test_records_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", None) as log:
        log.write(1, "train", loss=0.5, losses={"mlm": 0.5}, speed={"samples_per_second": 3.0})
        log.write(2, "evaluation", scores={"a/R@1": 1.0})
    first, second = read_metrics(tmp_path / "m.jsonl")
    assert first == {
        **{"step": 1, "event": "train", "loss": 0.5, "losses": {"mlm": 0.5}},
        "speed": {"samples_per_second": 3.0},
    }
    assert second["scores"] == {"a/R@1": 1.0}


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    with MetricsLog(file, None) as log:
        log.write(1, "train", loss=1.0)
        kept = log.size
        log.write(2, "train", loss=2.0)
    with file.open("ab") as torn:
        torn.write(b'{"step": 3, "eve')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]
    with MetricsLog(file, None, keep_bytes=kept, step=1) as log:
        log.write(2, "train", loss=2.5)
    assert [(record["step"], record["loss"]) for record in read_metrics(file)] == [(1, 1.0), (2, 2.5)]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", None) as log:
        log.write(1, "train", loss=math.nan, losses={"mlm": math.inf})
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: f"no JSON: {name}") == {
        "step": 1,
        "event": "train",
        "loss": None,
        "losses": {"mlm": None},
    }


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


ROUTERS = {f"router/visual_0{layer}/{name}": 1.0 for layer in range(6) for name in ("entropy", "dropped", "confidence")}
SPEED = {"samples_per_second": 8.0, "tokens_per_second": 64.0, "mfu": 0.5, "data_wait": 0.25, "tflops": 0.125}


def test_tensorboard_has_the_leading_figures_by_name_and_counts_the_steps_of_the_run(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", steps_before=100) as log:
        rates = {"decay": 0.5, "no_decay": 0.5, "decay_x0.8": 0.25}
        metrics = {"mlm/accuracy": 0.5, "univlc/visual_to_text_r1": 0.75, "router/experts_used_image": 3.0, **ROUTERS}
        log.write(4, "train", loss=0.5, losses={"mlm": 0.25}, skipped=0, lr=rates, metrics=metrics, speed=SPEED)
        log.write(4, "evaluation", scores={"a/R@1": 0.75, "a/R@5": 0.9, "b/accuracy, 5 classes": 0.5, "c/BLEU-4": 0.1})
    assert scalars(tmp_path / "tb") == {
        "Loss/weighted total": [(104, 0.5)],
        "Loss/MLM": [(104, 0.25)],
        "Accuracy within the batch/MLM: accuracy": [(104, 0.5)],
        "Accuracy within the batch/UniVLC: visual to text, R@1": [(104, 0.75)],
        "Experts used/image": [(104, 3.0)],
        "Optimizer/learning rate": [(104, 0.5)],
        "Speed/samples per second, all replicas": [(104, 8.0)],
        "Speed/MFU (of peak)": [(104, 0.5)],
        "Speed/waiting for data (of time)": [(104, 0.25)],
        "Scores/a/R@1": [(104, 0.75)],
        "Scores/b/accuracy, 5 classes": [(104, 0.5)],
    }


def test_tensorboard_hides_what_a_resumed_stage_has_taken_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", steps_before=10) as log:
        log.write(1, "train", loss=1.0)
        kept = log.size
        log.write(2, "train", loss=2.0)
        log.write(3, "train", loss=3.0)
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", keep_bytes=kept, step=1, steps_before=10) as log:
        log.write(2, "train", loss=2.5)
    assert scalars(tmp_path / "tb") == {"Loss/weighted total": [(11, 1.0), (12, 2.5)]}


def test_tensorboard_shows_samples_as_the_model_sees_them(tmp_path: Path) -> None:
    numbers = torch.arange(2)
    frames = torch.zeros(2, 3, 3, 4, 5, dtype=torch.uint8)  # two clips of three frames of 4 x 5 pixels
    frames[1, 2, 0] = 255  # the last frame of the second clip is red: the lower right part of the picture
    batch = Batch("video_text", frames, None, numbers, numbers, numbers, captions=("a *cat*", "<b>\x1b[31m"))
    with MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", steps_before=7) as log:
        log.show_samples(1, batch)
    with MetricsLog(tmp_path / "n.jsonl", None) as log:
        log.show_samples(1, batch)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (picture,) = events.Images("Samples/pictures")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert (picture.step, pixels.shape) == (8, (8, 15, 3))
    assert pixels[4:, 10:].tolist() == [[[255, 0, 0]] * 5] * 4
    assert pixels[:4].max() == pixels[4:, :10].max() == 0
    (texts,) = events.Tensors("Samples/texts/text_summary")
    assert texts.tensor_proto.string_val == [b"1. a \\*cat\\*\n2. \\<b>\\\\x1b\\[31m"]


def test_a_curve_is_drawn_at_the_steps_of_the_run_and_stands_in_no_line(tmp_path: Path) -> None:
    scores = [{"a/R@1": 0.25, "a/R@5": 0.5}, {"a/R@1": 0.75, "a/R@5": 1.0}]
    with (
        MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", steps_before=100) as log,
        MetricsLog(tmp_path / "n.jsonl", None) as bare,
    ):
        for step, one in zip((0, 40), scores, strict=True):
            log.draw(step, "curve", scores=one)
            bare.draw(step, "curve", scores=one)
    assert scalars(tmp_path / "tb") == {"Curve/a/R@1": [(100, 0.25), (140, 0.75)]}
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_the_length_of_the_lines_up_to_a_step(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    assert bytes_up_to(file, 5) == 0
    ends = [0]
    with MetricsLog(file, None) as log:
        for step in (0, 4, 9):
            log.write(step, "curve", scores={"a/R@1": 0.5})
            ends.append(log.size)
    assert [bytes_up_to(file, step) for step in (0, 3, 4, 8, 9, 99)] == [ends[i] for i in (1, 1, 2, 2, 3, 3)]
