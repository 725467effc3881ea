"""Learning at equal wall time: the joint plan against a plain two-tower CLIP in bare PyTorch.

Both see the same drawings, names and tags. First ``configs/plans/emoji.yaml``, its steps scaled to a given time, runs
as a user would run it, with all of its stages. Then the bare CLIP trains on the same cores for as long as that run took
in all, with start, hand-overs, checkpoints and evaluation. Scores are retrieval of Twemoji drawings, a style that
neither has seen, among all 1,599 names. Three seeds, two runs at a time, each on half of the cores.
"""

import json
import sys
from concurrent.futures import Future
from functools import partial

from benchmarks.measure import Ratio, Spread, over, short
from benchmarks.plan_runs import Cores, Lanes, PlanRun, run_on, run_plan, scaled_steps
from benchmarks.record import ROOT, Options, Report, Table, main_of

PLAN = ROOT / "configs" / "plans" / "emoji.yaml"
PLAN_CORE_MINUTES = 56.0
"""Approximate time of the full plan on one core. It only scales steps: the peer gets the measured time."""

MINUTES, QUICK_MINUTES = 7.0, 0.5
SEEDS = (0, 1, 2)
STAGE, TASK = "joint", "unseen style"
PLACES = (1, 10)
ONE_HIT = 1 / 1599
"""Lower bound of the peer's recall in ratios, since it may be 0 in a quick run."""


def run_ours(seed: int, minutes: float, cores: Cores) -> PlanRun:
    """The plan, shortened to about so many minutes."""
    share = minutes * len(cores) / PLAN_CORE_MINUTES
    return run_plan(PLAN, [f"seed={seed}", *scaled_steps(PLAN, share)], cores)


def run_peer(seed: int, ours: Future[PlanRun], cores: Cores) -> tuple[dict[int, float], int]:
    """The bare CLIP, for as long as the plan's run took; returns its recalls by place, and the pairs that it saw."""
    seconds = f"{ours.result().seconds:.1f}"
    command = [sys.executable, "-m", "benchmarks.bare_clip", seconds, str(seed), f"--plan={PLAN}"]
    peer = json.loads(run_on(cores, command).output.splitlines()[-1])
    return {int(place): recall for place, recall in peer["recalls"].items()}, peer["pairs"]


def run(options: Options) -> Report:
    """Runs the plans of all seeds, then their peers."""
    minutes = QUICK_MINUTES if options.quick else MINUTES
    seeds = SEEDS[:1] if options.quick else SEEDS
    with Lanes(options.device) as lanes:
        ours = [lanes.submit(partial(run_ours, seed, minutes)) for seed in seeds]
        peers = [lanes.submit(partial(run_peer, seed, run)) for seed, run in zip(seeds, ours, strict=True)]
    rows: list[list[str]] = []
    recalls: dict[tuple[int, str], list[float]] = {
        (k, name): [] for k in PLACES for name in ("joint plan", "bare CLIP")
    }
    for seed, (peer, seen), run in zip(seeds, (peer.result() for peer in peers), ours, strict=True):
        scores, seconds = run.result().scores[STAGE], run.result().seconds
        for k in PLACES:
            recalls[k, "joint plan"].append(scores[f"{TASK} image->text R@{k}"].value)
            recalls[k, "bare CLIP"].append(max(peer[k], ONE_HIT))
            again = scores[f"{TASK} image->text, re-ranked R@{k}"].value
            cells = [short(recalls[k, "joint plan"][-1]), short(again), short(peer[k])]
            rows.append([str(seed), f"R@{k}", *cells, f"{seconds:.0f}", str(seen)])
    columns = ("seed", "metric", "joint plan", "re-ranked", "bare CLIP", "seconds of each", "pairs of the bare CLIP")
    return Report(
        benchmark="learning",
        what=" ".join((__doc__ or "").split()),
        ratios=[
            Ratio(
                f"R@{k}, joint plan / bare CLIP",
                over(recalls[k, "joint plan"], recalls[k, "bare CLIP"]),
                at_least=1.0,
            )
            for k in PLACES
        ],
        tables=[
            Table("Image to text on the unseen style, 1,599 names", columns, rows),
            Table(
                "Over the seeds",
                ("metric", "model", "median (least to most)"),
                [[f"R@{k}", name, str(Spread.of(values))] for (k, name), values in recalls.items()],
            ),
        ],
        settings={
            "minutes": minutes,
            "plan": str(PLAN.relative_to(ROOT)),
            "seeds": list(seeds),
            "cores_of_each": lanes.cores_of_each,
            "at_a_time": lanes.count,
        },
    )


if __name__ == "__main__":
    main_of("learning", __doc__, run)
