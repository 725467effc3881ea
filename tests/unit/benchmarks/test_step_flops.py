"""The measured step is a training step, and its figures are those of the arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import step_flops
from benchmarks.record import Options
from benchmarks.step_flops import Case, cases_of, make_batch, training_step
from omnivl.architectures import OmniVL

CPU = torch.device("cpu")
OPTIONS = Options(CPU, threads=1, quick=True, out=Path("unused"))
SMALL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 32, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "video_size": 16, "num_frames": 4, "projection_size": 16},
)


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_texts_are_framed_and_without_padding(kind):
    batch = make_batch(Case("small", SMALL, kind, 8, torch.float32))
    batch.check()
    for row in batch.token_ids.tolist():
        assert (row[0], row[-1]) == (1, 2)
        assert min(row[1:-1]) >= 5


def test_twice_the_batch_is_twice_the_work():
    case = Case("small", SMALL, "image_text", 4, torch.float32)
    assert replace(case, batch_size=8).flops == pytest.approx(2 * case.flops)


def test_a_step_can_be_repeated():
    step = training_step(Case("small", SMALL, "image_text", 4, torch.bfloat16), CPU)
    first, second = step(), step()
    assert not first.skipped
    assert set(first.losses) == {"mlm", "mrm", "univlc", "vlm", "lm"}
    assert second.loss != first.loss  # the weights moved


def test_cases_cover_kinds_and_precisions():
    assert len({(case.kind, case.dtype) for case in cases_of(OPTIONS)}) == 4
    assert {case.preset for case in cases_of(replace(OPTIONS, quick=False))} == {"tiny", "small"}


def test_a_run_reports_a_ratio_and_a_profile_per_case(monkeypatch):
    case = Case("small", SMALL, "image_text", 4, torch.bfloat16)
    monkeypatch.setattr(step_flops, "cases_of", lambda options: [case])
    monkeypatch.setattr(
        step_flops, "best_product", lambda device: (lambda: torch.ones(64, 64).mm(torch.ones(64, 64)), 2.0 * 64**3)
    )
    report = step_flops.run(OPTIONS)
    assert [ratio.met for ratio in report.ratios] == [None]
    assert report.ratios[0].value.median > 0
    assert [table.title for table in report.tables] == ["Speed", "Where the time goes: small image_text bfloat16"]
    assert "matrix products" in {row[0] for row in report.tables[1].rows}
