"""Writes docs/layouts.md from a run of the parity tests, or from several runs of parts of them.

python -m pytest --full -o junit_family=xunit1 --junitxml parity.xml tests/distributed/test_layouts.py
python tests/distributed/layouts_page.py parity.xml
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TEST = "test_hosts_agree["
PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
HEAD = """# Layouts

Which parallel layouts give the same results as one plain process. Each row is one model under one layout: {steps}
optimizer steps of two micro-batches with all objectives. Batches are images in a spatial stage, clips in a temporal
one, both in a joint one, with texts and labels in turn, so that some layers and parts of layers have no gradient in
some steps. Gradients are clipped; the model has a momentum teacher, a queue and hard negatives over all replicas. The
same joined batch on one plain process is the reference; twins and queue are among the weights. Differences are the
largest over the steps, of losses and gradient norms relative, of weights and queue absolute. The tests allow 1e-5,
1e-4, 5e-5 and 5e-5; of the synthetic chain 1e-5, 1e-5, 1e-6 and 1e-6; of bf16 against bf16 1e-2, 0.1, 5e-3 and 5e-2.
fp32 unless bf16 is named. Rows that begin with `plan` are stages of `configs/plans`, at a width of 24, with their own
objectives; `names` is classification by names beside contrast, with a bag of words for a text encoder. In pipelines of
one transformer blocks stand on two stages wherever a step joins rows.

Written by `tests/distributed/layouts_page.py` from a run of `make test-full`: {passed} of {tests} tests of
`tests/distributed/test_layouts.py` passed, {layouts} layouts, in {seconds:.0f} s on two CPU cores. `make test` runs
all layouts of the joint stage with experts, and those of two processes with dense layers.

| model | layout | processes | loss | norm | weights | queue |
|---|---|---|---|---|---|---|
"""
TAIL = """
## A run that changes its layout
One run changes its layout at checkpoints: ZeRO-3 on two processes, then a pipeline of two stages on four processes,
then one process without DeepSpeed. The other runs the same plan on one process throughout. The model is small, with
masked words, contrast, momentum twins and queue on images and clips in turn, fp32.
`tests/integration/layout_change_plot.py` runs both and draws the plot; `make test` does the same with ten steps, and
compares evaluations and final weights too.

![losses of both runs, and their difference](images/layout_change.svg)

## What a layout costs
`python -m benchmarks overheads` ([result](../benchmarks/results/overheads-cpu.md)), two processes on two CPU cores at
equal work, measured in turns in one run. Time of a step over that of plain: ZeRO-1 1.04, ZeRO-2 1.17, ZeRO-3 1.65, a
pipeline of two stages 1.14 (with four micro-batches it is idle for a fifth of the time). Recomputing blocks takes 1.28
under plain, 1.17 under ZeRO-3, 1.25 in the pipeline. A checkpoint of 105 MB stops training for 0.03 of a step when it
is written in the background, for 0.10 when training waits for it.
"""
MODELS = {
    "synthetic": "synthetic chain",
    "unified": "one transformer",
    "recompute": "recomputed",
    "balanced": "experts balanced by a bias",
}


def model_of(name: str) -> str:
    """``real-limoe-recompute`` in words."""
    return ", ".join(MODELS.get(part, part) for part in name.split("-") if part != "real") or "dense, joint"


def layout_of(host: str) -> str:
    """``pipe2-zero1`` or ``zero3-ep2`` in words."""
    words = {
        "plain": "plain",
        "built": "built layer by layer",
        "offload": "optimizer offloaded",
        "files": "in files",
        "offload_all": "optimizer and parameters offloaded",
    }
    found = []
    for part in host.split("-"):
        kind, number = part.rstrip("0123456789"), part[len(part.rstrip("0123456789")) :]
        named = {"zero": f"ZeRO-{number}", "ep": f"experts cut over {number}", "pipe": f"{number} pipeline stages"}
        found.append(named.get(kind) or words[part])
    return ", ".join(found)


def page(reports: Sequence[Path]) -> str:
    """The page as Markdown."""
    every = [one for report in reports for one in ElementTree.parse(report).iter("testcase")]
    cases = [one for one in every if one.get("name", "").startswith(TEST)]
    properties = [one for case in cases for one in case.iterfind("properties/property")]
    rows: list[dict[str, Any]] = [json.loads(one.attrib["value"]) for one in properties if one.get("name") == "layout"]
    passed = sum(not any(case.find(what) is not None for what in ("failure", "error", "skipped")) for case in cases)
    seconds = sum(float(case.attrib["time"]) for case in cases)
    facts = {"steps": rows[0]["steps"], "tests": len(cases), "passed": passed, "seconds": seconds}
    facts["layouts"] = len(rows)
    lines = [
        f"| {model_of(row['model'])} | {layout_of(row['host'])} | {row['processes']} | {row['loss']:.0e} | "
        f"{row['norm']:.0e} | {row['weight']:.0e} | {row['queue']:.0e} |"
        for row in rows
    ]
    return HEAD.format(**facts) + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page([Path(name) for name in sys.argv[1:]]), encoding="utf-8")
