"""Writes docs/layouts.md from a run of the parity tests.

python -m pytest tests/distributed/test_zero_equals_plain.py --junitxml parity.xml
python tests/distributed/layouts_page.py parity.xml
"""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TEST = "test_hosts_agree["
PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
HEAD = """# Layouts

Which layouts give what one plain process gives. Each row is one model under one layout: {steps} optimizer steps of
two micro-batches, fp32, images and clips, texts and labels in turn, so that layers and parts of layers go without a
gradient in some steps; gradients clipped, a momentum teacher, a queue and hard negatives over all replicas. The
same joined batch on one plain process is the reference; twins and queue are among the weights. Differences are the
largest over the steps, of losses and gradient norms relative, of weights absolute. The tests allow 1e-5, 1e-4 and
5e-5 (the synthetic chain 1e-5, 1e-5 and 1e-6).

Written by `tests/distributed/layouts_page.py` from a run of `tests/distributed/test_zero_equals_plain.py`: {passed}
of {tests} tests passed, in {seconds:.0f} s on two CPU cores.

| model | layout | processes | loss | norm | weights |
|---|---|---|---|---|---|
"""
MODELS = {
    "synthetic": "synthetic chain",
    "real": "towers, all objectives",
    "unified": "one transformer",
    "recompute": "recomputed",
}


def model_of(chain: str) -> str:
    """``real-limoe-recompute`` in words."""
    return ", ".join(MODELS.get(part, part) for part in chain.split("-") if part != "real" or chain == "real")


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


def page(report: Path) -> str:
    """The page as Markdown."""
    cases = [one for one in ElementTree.parse(report).iter("testcase") if one.get("name", "").startswith(TEST)]
    properties = [one for case in cases for one in case.iterfind("properties/property")]
    rows: list[dict[str, Any]] = [json.loads(one.attrib["value"]) for one in properties if one.get("name") == "layout"]
    passed = sum(not any(case.find(what) is not None for what in ("failure", "error", "skipped")) for case in cases)
    seconds = sum(float(case.attrib["time"]) for case in cases)
    facts = {"steps": rows[0]["steps"], "tests": len(cases), "passed": passed, "seconds": seconds}
    lines = [
        f"| {model_of(row['chain'])} | {layout_of(row['host'])} | {row['processes']} | {row['loss']:.0e} | "
        f"{row['norm']:.0e} | {row['weight']:.0e} |"
        for row in rows
    ]
    return HEAD.format(**facts) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1])), encoding="utf-8")
