"""Learning at equal wall time: the joint plan against a plain two-tower CLIP in bare PyTorch.

Both see the same drawings, names and tags. First ``configs/plans/emoji.yaml``, its steps scaled to the time wanted,
runs as a user would run it, with all of its stages; then the bare CLIP trains for as long as that run took from start
to end, start-up, hand-overs, checkpoints and evaluation included. Measured on Twemoji drawings, a style that neither
has seen, against all 1,599 names. Three seeds, taken in turns.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.bare_clip import train_bare_clip, unseen_style_recalls
from benchmarks.measure import Ratio, Spread, over, short
from benchmarks.record import ROOT, Options, Report, Table, main_of
from engine.plan_parse import load_plan

PLAN = ROOT / "configs" / "plans" / "emoji.yaml"
PLAN_MINUTES = 60.0
"""What the plan takes at full length on two CPU cores."""

MINUTES, QUICK_MINUTES = 10.0, 0.5
SEEDS = (0, 1, 2)
TASK = "unseen style"
PLACES = (1, 10)
ONE_HIT = 1 / 1599
"""Floor of the peer's recall in ratios: a quick run may find nothing."""


def scaled_steps(share: float) -> list[str]:
    """Overrides that shorten every stage of the plan, and its warm-up, to a share of its steps."""
    overrides = []
    for stage in load_plan(PLAN).stages:
        steps = max(2, round(stage.steps * share))
        warmup = min(steps, max(1, round(stage.optimizer.warmup_steps * share)))
        overrides += [f"stages.{stage.name}.steps={steps}", f"stages.{stage.name}.optimizer.warmup_steps={warmup}"]
    return overrides


def run_plan(seed: int, share: float) -> tuple[Mapping[str, float], float]:
    """Runs the plan in a folder of its own.

    Returns:
        The scores of the unseen style by metric, and the seconds that the command took.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "launcher.cli", "pretrain", str(PLAN), f"seed={seed}", *scaled_steps(share)]
        start = time.monotonic()
        subprocess.run([*command, "--run-folder", str(run)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        evaluation = json.loads(sorted((run / "stages").glob("*/evaluation.json"))[-1].read_text(encoding="utf-8"))
    scores = [score for task in evaluation["results"] for score in task["scores"] if score["task"] == TASK]
    return {score["metric"]: score["value"] for score in scores}, seconds


def run(options: Options) -> Report:
    """Lets the two train in turns, seed by seed."""
    minutes = QUICK_MINUTES if options.quick else MINUTES
    rows: list[list[str]] = []
    ours: dict[int, list[float]] = {k: [] for k in PLACES}
    bare: dict[int, list[float]] = {k: [] for k in PLACES}
    for seed in SEEDS[:1] if options.quick else SEEDS:
        scores, seconds = run_plan(seed, minutes / PLAN_MINUTES)
        model, pairs = train_bare_clip(seconds, seed)
        peer = unseen_style_recalls(model)
        for k in PLACES:
            ours[k].append(scores[f"image->text R@{k}"])
            bare[k].append(max(peer[k], ONE_HIT))
            again = scores.get(f"image->text, re-ranked R@{k}")
            cells = [short(ours[k][-1]), "-" if again is None else short(again), short(peer[k])]
            rows.append([str(seed), f"R@{k}", *cells, f"{seconds:.0f}", str(pairs)])
    columns = ("seed", "metric", "joint plan", "re-ranked", "bare CLIP", "seconds of each", "pairs of the bare CLIP")
    spreads = [
        [f"R@{k}", name, str(Spread.of(values))]
        for k in PLACES
        for name, values in (("joint plan", ours[k]), ("bare CLIP", bare[k]))
    ]
    return Report(
        benchmark="learning",
        what=" ".join((__doc__ or "").split()),
        ratios=[Ratio(f"R@{k}, joint plan / bare CLIP", over(ours[k], bare[k]), at_least=1.0) for k in PLACES],
        tables=[
            Table("Image to text on the unseen style, 1,599 names", columns, rows),
            Table("Over the seeds", ("metric", "model", "median (least to most)"), spreads),
        ],
        settings={"minutes": minutes, "plan": str(PLAN.relative_to(ROOT)), "seeds": list(SEEDS)},
    )


if __name__ == "__main__":
    main_of("learning", __doc__, run)
