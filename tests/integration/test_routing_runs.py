"""A run that looks at its routers: scores, page and table of the stage, report, and the table at the end."""

import json
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    from conftest import Pretraining

pytestmark = [pytest.mark.integration, pytest.mark.distributed]

ROUTED = """
name: routed
model:
  preset: MODEL
  architecture: unified
  ffn: {kind: limoe, num_experts: 4, every: 1, top_k: 2, capacity_factor: 0.5}
parallel: {host: zero, zero_stage: 3, precision: fp32}
launch: {processes: 2}
batch: {micro_batch_size_per_gpu: 4}
logging: {every: 1, tensorboard: false}
checkpoint: {keep_best: "stills/experts used, image"}
stages:
  - name: contrastive
    steps: 2
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc]
    evaluate:
      every: 1
      tasks:
        - {kind: routing, name: stills, max_samples: 9}
        - {kind: retrieval, max_samples: 9}
        - {kind: routing, name: clips, media: video, max_samples: 5}
"""


def test_sharded_processes_look_at_the_same_routing(pretraining: "Pretraining") -> None:
    pretraining.write_plan(ROUTED)
    output = pretraining.run("run", limit=200)
    stage = pretraining.stage("run", "01-contrastive")
    results = json.loads((stage / "evaluation.json").read_text())["results"]
    found = {score["metric"]: score["value"] for score in results[0]["scores"]}
    assert sorted(found) == [
        *["dropped, image", "dropped, text", "entropy, image, nats", "entropy, text, nats"],
        *["experts used, image", "experts used, text"],
    ]
    table = pd.read_parquet(stage / "routing.parquet")
    assert table[table["modality"] == "image"]["sample"].nunique() == 9, "one process saw all"
    by_layer = 1.0 - table[table["modality"] == "image"].groupby("layer", observed=True)["served"].mean()
    assert found["dropped, image"] == pytest.approx(by_layer.mean())
    assert by_layer.mean() > 0
    assert set(pd.read_parquet(stage / "routing-2.parquet")["modality"]) == {"video", "text"}
    assert "experts used, image" in output
    assert "Routers at the end of stage contrastive" in output
    assert "of 4" in output
    report = (pretraining.folder / "run" / "report.html").read_text()
    assert report.count(get_plotlyjs()) == 1
    for title in ("stills (routing.html)", "clips (routing-2.html)"):
        assert f"<summary>{title}</summary>" in report
    assert report.count("&lt;section class=&#34;routing&#34;&gt;") == 2
    assert report.count('<iframe sandbox=""') == 2
