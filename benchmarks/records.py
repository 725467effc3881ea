"""The table of records: recall on a style that training has not seen, for a given CPU time, beside a bare CLIP.

``configs/plans/records.yaml`` trains on one core, its steps scaled so that they take 1, 3, 10 or 30 minutes of CPU time
by a measurement of its speed just before. Then the bare CLIP trains for as many CPU seconds, on the same drawings in
the same views, from the same loader. The settings of both were chosen by recall on the unseen style itself: no weight
is trained on it, but it is no style that nobody has looked at. Rows compare recipes: the bare CLIP has AdamW, contrast
within a batch and a text tower, ours Muon, all names in every step and no text blocks. What counts is the time of
training: the start and the evaluation do not, and decoding the drawings does.

python -m benchmarks records                         # all rows, three seeds: about five CPU hours
python -m benchmarks.records --minutes 1 3           # these rows only; the others stay as they are
python -m benchmarks.records --tune 30 --minutes 30  # choose the bare CLIP's settings anew, at 30 CPU minutes
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bare_clip import PLAN, Settings, Training
from benchmarks.measure import Ratio, Spread, over, short
from benchmarks.plan_runs import Cores, Lanes, Spent, run_on, run_plan, scaled_steps
from benchmarks.record import (
    ROOT,
    Options,
    Report,
    Table,
    main_of,
    markdown_table,
    short_commit,
    values_path,
    write_page,
)
from engine.plan.parse import load_plan
from engine.telemetry.environment import usable_cores

BUDGETS = (1.0, 3.0, 10.0, 30.0)
"""CPU minutes of the rows."""
TARGETS: Mapping[float, float] = {10.0: 1.5, 30.0: 1.5}
"""Least R@1 over that of the bare CLIP, by CPU minutes."""
SEEDS = (0, 1, 2)
TUNING_MINUTES, TUNING_SEED = 3.0, 0
CANDIDATES = (
    Settings(learning_rate=6e-4, text_layers=1),
    Settings(learning_rate=6e-4, text_layers=1, vision_layers=3),
    Settings(learning_rate=1.2e-3, text_layers=1, vision_layers=3),
    Settings(learning_rate=6e-4, text_layers=0, vision_layers=3),
    Settings(learning_rate=1.2e-3, text_layers=0, vision_layers=3),
    Settings(learning_rate=2.4e-3, text_layers=0, vision_layers=3),
    Settings(learning_rate=1.2e-3, text_layers=0, vision_layers=2),
)
"""Settings of which the bare CLIP gets the best: fewer blocks, of either tower, and the rate of the smaller ones."""
PROBE_STEPS = 15
"""Steps of each half of the measurement of speed: in the first half all drawings are decoded."""
QUICK_MINUTES, QUICK_PROBE_STEPS = 0.05, 2

PAGE = ROOT / "docs" / "records.md"
STAGE, TASK = "spatial", "unseen style"
PLACES = (1, 10)
ONE_HIT = 1 / 1599
"""Lower bound of the bare CLIP's recall in ratios, since it may be 0 in a quick run."""

RECORDS, RUNS, TUNING = "Records", "Runs", "Settings of the bare CLIP"
COLUMNS: Mapping[str, Sequence[str]] = {
    RECORDS: (
        *("CPU minutes", "OmniVL R@1", "R@10", "bare CLIP R@1", "R@10", "R@1, OmniVL / bare CLIP"),
        *("16x16 pixels R@1, R@10", "chance", "CPU seconds", "pairs seen", "of the bare CLIP"),
        *("PFLOP", "of the bare CLIP", "seeds", "commit"),
    ),
    RUNS: ("CPU minutes", "seed", "model", "R@1", "R@10", "CPU seconds", "pairs seen", "PFLOP"),
    TUNING: ("settings", "R@1", "R@10", "CPU minutes", "pairs seen", "commit", "taken"),
}


@dataclass(frozen=True)
class Run:
    """A trained model of either kind.

    Attributes:
        recalls: Of the unseen drawings against all names, by place.
        spent: What training took.
        pixels: Recalls of the pixels of the styles that were trained on, by place.
        chance: Recalls of guessing, by place.
    """

    recalls: Mapping[int, float]
    spent: Spent
    pixels: Mapping[int, float]
    chance: Mapping[int, float]


def run_ours(seed: int, minutes: float, probe_steps: int, cores: Cores) -> Run:
    """The plan, for about so many CPU minutes of training."""
    whole = load_plan(PLAN).stages[0].steps
    unscored = [f"seed={seed}", f"logging.every={probe_steps}", f"stages.{STAGE}.evaluate.tasks=[]"]
    probe = run_plan(PLAN, [*unscored, *scaled_steps(PLAN, 2 * probe_steps / whole)], cores)
    steps = steps_within(60 * minutes, *probe.windows[STAGE])
    run = run_plan(PLAN, [f"seed={seed}", *scaled_steps(PLAN, steps / whole)], cores)
    scores = {k: run.scores[STAGE][f"{TASK} image->text R@{k}"] for k in PLACES}
    return Run(
        {k: score.value for k, score in scores.items()},
        Spent.over(run.windows[STAGE]),
        {k: score.baseline or 0.0 for k, score in scores.items()},
        {k: score.chance or 0.0 for k, score in scores.items()},
    )


def steps_within(seconds: float, first: Spent, second: Spent) -> int:
    """How many steps take so many CPU seconds, where the first ones took longer; at least two."""
    each = second.cpu_seconds / second.steps
    more = max(0.0, first.cpu_seconds - first.steps * each)
    return max(2, round((seconds - more) / each))


def run_peer(seed: int, seconds: float, settings: Settings, cores: Cores) -> Run:
    """The bare CLIP, for so many CPU seconds."""
    command = [sys.executable, "-m", "benchmarks.bare_clip", f"{seconds:.1f}", str(seed), "--cpu", f"--plan={PLAN}"]
    found = json.loads(run_on(cores, [*command, *settings.arguments()]).output.splitlines()[-1])
    recalls = {int(place): recall for place, recall in found.pop("recalls").items()}
    training = Training(**found)
    steps = training.pairs // settings.batch_size
    return Run(recalls, Spent(steps, training.seconds, training.pairs, training.flops), {}, {})


def run(options: Options) -> Report:
    """Chooses the bare CLIP's settings where the result file has none of today's, and makes the rows asked for."""
    tables, ratios = earlier_results(values_path("records", options))
    own, commit = options.own, short_commit()
    budgets, seeds = (own.minutes, own.seeds) if not options.quick else ((QUICK_MINUTES,), SEEDS[:1])
    candidates = CANDIDATES[:2] if options.quick else CANDIDATES
    tuned = own.tune or (QUICK_MINUTES if options.quick else TUNING_MINUTES)
    probe_steps = QUICK_PROBE_STEPS if options.quick else PROBE_STEPS
    with Lanes(options.device, wanted=usable_cores()) as lanes:
        if own.tune or [row[0] for row in tables[TUNING]] != [str(one) for one in candidates]:
            tried = [lanes.submit(partial(run_peer, TUNING_SEED, 60 * tuned, one)) for one in candidates]
            tables[TUNING] = tuning_rows(tuned, candidates, [one.result() for one in tried], commit)
        settings = next(one for one, row in zip(candidates, tables[TUNING], strict=True) if row[-1])

        def follow(seed: int, ours: Future[Run], cores: Cores) -> Run:
            return run_peer(seed, ours.result().spent.cpu_seconds, settings, cores)

        cases = [(minutes, seed) for minutes in budgets for seed in seeds]
        ours = {case: lanes.submit(partial(run_ours, case[1], case[0], probe_steps)) for case in cases}
        peers = {case: lanes.submit(partial(follow, case[1], run)) for case, run in ours.items()}
        for minutes in budgets:
            made = {seed: ours[minutes, seed].result() for seed in seeds}
            rivals = {seed: peers[minutes, seed].result() for seed in seeds}
            ratios[minutes] = ratio_of(minutes, made, rivals)
            row = record_row(ratios[minutes], minutes, made, rivals, commit)
            tables[RECORDS] = replaced(tables[RECORDS], [row])
            tables[RUNS] = replaced(tables[RUNS], run_rows(minutes, made, rivals))
    settled = {"plan": str(PLAN.relative_to(ROOT)), "cores_of_each": lanes.cores_of_each, "at_a_time": lanes.count}
    return Report(
        benchmark="records",
        what=" ".join((__doc__ or "").partition("\n\npython")[0].split()),
        ratios=[ratios[minutes] for minutes in sorted(ratios)],
        tables=[Table(title, COLUMNS[title], tables[title]) for title in COLUMNS],
        settings=settled,
    )


def earlier_results(values: Path) -> tuple[dict[str, list[list[str]]], dict[float, Ratio]]:
    """Rows of the tables and ratios by CPU minutes of an earlier result file; nothing where there is none."""
    found = json.loads(values.read_text("utf-8")) if values.is_file() else {"tables": [], "ratios": []}
    rows = {table["title"]: table["rows"] for table in found["tables"]}
    ratios = [Ratio(one["name"], Spread(**one["value"]), one["at_least"], one["at_most"]) for one in found["ratios"]]
    budgets = [float(row[0]) for row in rows.get(RECORDS, [])]
    return {title: rows.get(title, []) for title in COLUMNS}, dict(zip(budgets, ratios, strict=True))


def replaced(rows: Sequence[list[str]], new: Sequence[list[str]]) -> list[list[str]]:
    """The rows with new ones in place of those of the same CPU minutes, in the order of these."""
    minutes = {row[0] for row in new}
    return sorted([*(row for row in rows if row[0] not in minutes), *new], key=lambda row: float(row[0]))


def tuning_rows(minutes: float, tried: Sequence[Settings], runs: Sequence[Run], commit: str) -> list[list[str]]:
    """A row for each of the settings; the one with the highest recall at 10 is marked as taken."""
    best = max(range(len(runs)), key=lambda place: (runs[place].recalls[10], runs[place].recalls[1]))
    return [
        [
            *(str(settings), short(run.recalls[1]), short(run.recalls[10]), f"{minutes:g}"),
            *(f"{run.spent.samples:,.0f}", commit, "taken" if place == best else ""),
        ]
        for place, (settings, run) in enumerate(zip(tried, runs, strict=True))
    ]


def ratio_of(minutes: float, ours: Mapping[int, Run], peers: Mapping[int, Run]) -> Ratio:
    """R@1 over that of the bare CLIP with the same seed."""
    rivals = [max(peers[seed].recalls[1], ONE_HIT) for seed in ours]
    value = over([run.recalls[1] for run in ours.values()], rivals)
    return Ratio(f"R@1 after {minutes:g} CPU minutes, OmniVL / bare CLIP", value, at_least=TARGETS.get(minutes))


def record_row(
    ratio: Ratio, minutes: float, ours: Mapping[int, Run], peers: Mapping[int, Run], commit: str
) -> list[str]:
    """The row of a budget: medians and ranges over the seeds."""
    recalls = [str(Spread.of([run.recalls[k] for run in runs.values()])) for runs in (ours, peers) for k in PLACES]
    first = next(iter(ours.values()))
    pairs = [statistics.median(run.spent.samples for run in runs.values()) for runs in (ours, peers)]
    flops = [statistics.median(run.spent.flops / 1e15 for run in runs.values()) for runs in (ours, peers)]
    return [
        *(f"{minutes:g}", *recalls, str(ratio.value)),
        *(", ".join(short(known[k]) for k in PLACES) for known in (first.pixels, first.chance)),
        str(Spread.of([run.spent.cpu_seconds for run in ours.values()])),
        *(f"{count:,.0f}" for count in pairs),
        *(short(count) for count in flops),
        *(", ".join(map(str, ours)), commit),
    ]


def run_rows(minutes: float, ours: Mapping[int, Run], peers: Mapping[int, Run]) -> list[list[str]]:
    """A row for each training of a budget."""
    return [
        [
            *(f"{minutes:g}", str(seed), model, short(run.recalls[1]), short(run.recalls[10])),
            *(f"{run.spent.cpu_seconds:.1f}", f"{run.spent.samples:,.0f}", short(run.spent.flops / 1e15)),
        ]
        for seed in ours
        for model, run in (("OmniVL", ours[seed]), ("bare CLIP", peers[seed]))
    ]


def page_of(found: Mapping[str, Any]) -> str:
    """``docs/records.md`` from the content of the result file."""
    parts = [
        "# Records",
        "Written by `python -m benchmarks records` from its "
        f"[result](../benchmarks/results/{found['benchmark']}-cpu.json); do not edit.",
        found["what"].replace("``", "`"),
    ]
    missed = [ratio for ratio in found["ratios"] if ratio["met"] is False]
    parts += [f"**Missed: {one['name']} is {one['value']['median']:.2f}, not {one['target']}.**" for one in missed]
    for table in found["tables"]:
        parts.append(f"## {table['title']}\n\n{_NOTES[table['title']]}")
        parts.append(markdown_table(table["columns"], table["rows"]))
    machine = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "numpy"))
    parts.append(f"The newest rows: {found['date'][:10]}, {found['cpu']}, {machine}.")
    return "\n\n".join(parts) + "\n"


_NOTES: Mapping[str, str] = {
    RECORDS: "Medians over the seeds, with the least and the most in brackets. Recalls are those of 1,599 Twemoji "
    "drawings among all 1,599 names, picture to text. Pixels are the nearest drawing of the styles that were trained "
    "on, without learning. PFLOP are the matrix products that training needs, as the engine counts them.",
    RUNS: "Each training by itself.",
    TUNING: f"Tried with seed {TUNING_SEED}; the one with the highest R@10 is taken for all rows.",
}


def add_own(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--minutes", type=float, nargs="+", default=BUDGETS, help="rows to make (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of these rows (default: %(default)s)")
    parser.add_argument(
        "--tune",
        type=float,
        metavar="MINUTES",
        help="choose the bare CLIP's settings anew, by trainings of so many CPU minutes "
        f"(by default only where the result file has no choice, {TUNING_MINUTES:g})",
    )


def main() -> None:
    """Runs, and writes the page: ``docs/records.md`` of a full run, else beside the result file."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CPU time is what is equal
    write_page(main_of("records", __doc__, run, add_own), PAGE, page_of)


if __name__ == "__main__":
    main()
