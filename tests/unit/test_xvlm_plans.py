"""Plans of X-VLM and X2-VLM: the published sizes, checks without data, and what is refused."""

from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.plan.parse import load_plan
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


@pytest.mark.parametrize(
    ("name", "width", "published"),
    [("xvlm_base", 768, None), ("x2vlm_base", 768, 255), ("x2vlm_large", 1024, 593)],
)
def test_the_header_says_the_counts_that_the_built_model_has(name: str, width: int, published: int | None) -> None:
    stage = load_plan(PLANS / f"{name}.yaml").stages[-1]
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    count = sum(parameter.numel() for parameter in chain.parameters() if parameter.requires_grad)
    # The map to the words is tied there; 512 positions, two token types.
    tied = count - 30_522 * width
    text = (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"#   size:      {count / 1e6:.1f} M that are trained" in text
    assert f"table here: {tied / 1e6:.1f} M;" in text
    if published is not None:
        assert round((tied + (512 - 40 + 2) * width) / 1e6) == published


@pytest.mark.parametrize(("name", "processes"), [("xvlm_base", 8), ("x2vlm_base", 8), ("x2vlm_large", 16)])
def test_a_plan_is_checked_without_data_or_vocabulary(name: str, processes: int) -> None:
    plan = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], world_size=processes)
    for stage in summarize(plan, processes)["stages"]:
        assert stage["warnings"] == []
        assert stage["samples_per_step"] == 1024


REGIONS = "stages.0.objectives.3"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "xvlm_tiny",
            "stages.0.objectives.4.shares_head=locate",
            "stages.0.objectives.4.shares_head: got 'locate'; allowed key of an objective of its kind with a head of "
            "its own: 'vlm'; change it, or leave it out",
        ),
        ("xvlm_tiny", "stages.0.data.1.fields=[regions]", "got 'regions'; allowed a mapping with 'region_boxes'"),
        ("xvlm_tiny", f"{REGIONS}.regions=-1", "stages.0.objectives.3.regions: got -1; allowed at least 0"),
        (
            "xvlm_tiny",
            f"{REGIONS}.regions=0",
            "draws samples by regions/embedding, regions/visual_embedding, which no objective trains",
        ),
        (
            "xvlm_tiny",
            f"{REGIONS}.regions=3",
            "objectives.4.regions: got 4; allowed 3, as other objectives on data entry 'regions' have; make them equal",
        ),
        ("xvlm_tiny", "model.sizes=native", "model.sizes: got 'native'; allowed 'fixed' or 'stretched': boxes are cut"),
        ("xvlm_tiny", "model.momentum={}", "allowed null in 'xvlm', which has none"),
        (
            "albef_tiny",
            "stages.0.objectives=[{kind: itc, regions: 4}]",
            "stages.0.objectives.0.kind: got 'itc', which asks for the stream 'regions'; allowed objectives on the",
        ),
        ("x2vlm_tiny", "stages.1.objectives.3.on=[clips]", "which acts on none of the stage's kinds"),
    ],
)
def test_a_plan_that_it_cannot_serve_is_refused(name: str, change: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(PLANS / f"{name}.yaml", [change])
    assert message in str(caught.value)
