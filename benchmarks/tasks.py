"""Downstream tasks on generated scenes: what pretraining brings, and what the text or the picture alone would say.

``configs/plans/tasks.yaml`` learns to describe scenes, then fine-tunes that model for each task;
``configs/plans/few_shot.yaml`` learns what documents show, then to bind names. The same stages also begin from new
weights, and learn from the same samples in black (the text alone is known) or without their text (the picture alone),
from new weights. All are scored on samples of part ``test``. Writes ``docs/tasks.md``.

python -m benchmarks tasks                                # three seeds of five tasks, two runs at a time
python -m benchmarks.tasks --seeds 1 --stages questions   # some of it
python -m benchmarks.tasks --folder runs/tasks            # goes on where it was ended
python -m benchmarks tasks --quick                        # everything once, with a few steps
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio, Spread, over
from benchmarks.plan_runs import Cores, Lanes, PlanRun, run_plan, scaled_steps
from benchmarks.record import ROOT, Options, Report, Table, main_of, markdown_table, write_page
from engine.plan.parse import load_plan

PLANS = tuple(ROOT / "configs" / "plans" / f"{name}.yaml" for name in ("tasks", "few_shot"))
PAGE = ROOT / "docs" / "tasks.md"
PRETRAINED, SCRATCH, TEXT_ALONE, PICTURE_ALONE = "pretrained", "from scratch", "text alone", "picture alone"
REPEATED = ("questions", "entailment", "dialogue", "grounding", "captions")
"""Stages that run with every seed; the others run with the first one alone."""

_HIDDEN = {TEXT_ALONE: "picture", PICTURE_ALONE: "text"}
QUICK_SHARE = 0.005
QUICK_SAMPLES = 32


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        stage: The stage that is scored.
        score: The score, as ``task metric``.
        task: The task in words.
        hides: What may be hidden, so that the task still makes sense: of the picture and the text.
    """

    stage: str
    score: str
    task: str
    hides: tuple[str, ...] = ("picture", "text")


FIGURES = (
    Figure("questions", "questions accuracy", "questions about a picture: accuracy"),
    *(
        Figure("questions", f"questions accuracy, {kind}", f"... of type {kind}")
        for kind in ("exist", "place", "ground", "what")
    ),
    Figure("questions", "questions, unseen pairs accuracy", "... about pairs of things that never stood together"),
    Figure("entailment", "entailment accuracy", "visual entailment: accuracy"),
    Figure("pairs", "pairs accuracy", "statements about two pictures: accuracy"),
    Figure("reasons", "reasons accuracy", "one of four answers: accuracy"),
    Figure("reasons", "reasons reason given the right answer", "one of four reasons: accuracy"),
    Figure("dialogue", "dialogue mean reciprocal rank", "dialogue, ten options: mean reciprocal rank"),
    Figure("grounding", "boxes, by regression accuracy at IoU 0.5", "referring expressions, box by regression"),
    Figure("grounding", "boxes, by choice accuracy at IoU 0.5", "... box chosen among all"),
    Figure("grounding", "masks mIoU", "... mask: mean IoU"),
    Figure("captions", "captions keyword F1", "captions: keyword F1", hides=("picture",)),
    Figure("clips", "clips accuracy", "questions about a clip: accuracy"),
    Figure("statements", "statements on clips accuracy", "statements about a clip: accuracy"),
    Figure("sentiment", "sentiment MAE", "sentiment: mean absolute error"),
    Figure("answers", "answers, written accuracy", "answers written word by word: accuracy"),
    Figure("answers", "answers, ranked accuracy", "... ranked over a list"),
    Figure("paragraphs", "paragraphs keyword F1", "paragraphs: keyword F1", hides=("picture",)),
    Figure("phrases", "phrases any-box R@1", "phrases, any of their boxes"),
    Figure("phrases", "phrases merged-box R@1", "... the box around all"),
    Figure("retrieval", "retrieval text->image R@1", "pictures found by one of four captions: R@1", hides=()),
    Figure("retrieval", "retrieval text->image, re-ranked R@1", "... re-ranked by matching", hides=()),
    Figure("retrieval", "retrieval image->text R@1", "captions found by their picture: R@1", hides=()),
    Figure("retrieval", "neighbours accuracy", "class of a drawing by its nearest neighbours: accuracy", hides=()),
    Figure("clip_retrieval", "clips text->video R@1", "clips found by their caption: R@1", hides=()),
    Figure("actions", "actions accuracy", "action recognition: accuracy", hides=()),
    Figure("probe", "linear probe accuracy", "linear probe, class of a drawing: accuracy", hides=()),
    Figure("binding", "four names accuracy", "in context, names bound by 4 examples: accuracy"),
    Figure("binding", "four names, unseen things accuracy", "... of things never seen in training"),
    Figure("binding", "eight names accuracy", "in context, names bound by 8 examples: accuracy"),
    Figure("binding", "eight names, unseen things accuracy", "... of things never seen in training"),
)


def run(options: Options) -> Report:
    """Runs every variant with every seed, the longest first."""
    seeds = range(1 if options.quick else options.own.seeds)
    known = list(dict.fromkeys(one.stage for one in FIGURES))
    stages = [name for name in known if not options.own.stages or name in options.own.stages]
    with Lanes(options.device) as lanes:
        waiting: dict[tuple[str, int], list[Future[PlanRun]]] = {}
        for variant in (PRETRAINED, SCRATCH, TEXT_ALONE, PICTURE_ALONE):
            for seed in seeds if variant in (PRETRAINED, SCRATCH) else seeds[:1]:
                repeated = stages if seed == seeds[0] else [name for name in stages if name in REPEATED]
                for plan in PLANS:
                    if wanted := [name for name in repeated if name in _names(plan)]:
                        folder = _folder(options.own.folder, plan, variant, seed)
                        job = partial(_run, plan, variant, wanted, seed, options.quick, folder)
                        waiting.setdefault((variant, seed), []).append(lanes.submit(job))
        runs: dict[str, list[PlanRun]] = {}
        for (variant, _), futures in waiting.items():
            runs.setdefault(variant, []).append(PlanRun.together([one.result() for one in futures]))
        settings = {
            "plans": [str(plan.relative_to(ROOT)) for plan in PLANS],
            "seeds": len(seeds),
            "at_a_time": lanes.count,
            "runs_kept": options.own.folder is not None,
        }
    figures = [one for one in FIGURES if one.stage in stages]
    ratios = [_ratio(one, runs) for one in figures]
    table = Table("Tasks", ("task", "chance", *runs, "pretraining"), [_row(one, runs) for one in figures])
    spent = [
        [variant, *(f"{one.seconds:.0f} / {one.cpu_seconds:.0f}" for one in found)] for variant, found in runs.items()
    ]
    columns = ("variant", *(f"seed {seed}" for seed in seeds))
    filled = [row + [""] * (len(columns) - len(row)) for row in spent]
    seconds = Table("Seconds by the clock / of the cores", columns, filled)
    return Report("tasks", " ".join((__doc__ or "").split("\n\npython")[0].split()), ratios, [table, seconds], settings)


def add_own(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the first two variants")
    parser.add_argument("--folder", type=Path, help="where runs are kept, to go on where it was ended")
    parser.add_argument("--stages", nargs="+", default=[], help="these tasks' stages only")


def _folder(kept: Path | None, plan: Path, variant: str, seed: int) -> Path | None:
    """Where a run is kept, if runs are."""
    first = "" if plan == PLANS[0] else f"{plan.stem}-"
    return kept / f"{first}{variant.replace(' ', '-')}-{seed}" if kept else None


def _names(plan: Path) -> list[str]:
    """The stages of a plan."""
    return [stage.name for stage in load_plan(plan).stages]


def overrides_of(path: Path, variant: str) -> list[str]:
    """What a variant changes in a plan, whichever of its stages run: a run is kept of one plan."""
    if variant == PRETRAINED:
        return []
    tasks = {one.stage for one in FIGURES}
    found: list[str] = []
    for stage in load_plan(path).stages:
        if stage.name not in tasks:
            continue
        found.append(f"stages.{stage.name}.init_from=null")
        if variant != SCRATCH:
            hidden = _HIDDEN[variant]
            entries, places = range(len(stage.data)), range(len(stage.evaluate.tasks))
            found += [f"stages.{stage.name}.data.{entry}.where.hide=[{hidden}]" for entry in entries]
            found += [f"stages.{stage.name}.evaluate.tasks.{place}.where.hide=[{hidden}]" for place in places]
    return found


def _run(
    plan: Path, variant: str, stages: Sequence[str], seed: int, quick: bool, folder: Path | None, cores: Cores
) -> PlanRun:
    overrides = [f"seed={seed}", *overrides_of(plan, variant)]
    if quick:
        overrides += scaled_steps(plan, QUICK_SHARE)
        for stage in load_plan(plan).stages:
            places = range(len(stage.evaluate.tasks))
            overrides += [f"stages.{stage.name}.evaluate.tasks.{one}.max_samples={QUICK_SAMPLES}" for one in places]
    wanted = [name for name in stages if variant not in _HIDDEN or _may_hide(name, _HIDDEN[variant])]
    before = _before(plan, wanted) if variant == PRETRAINED else []
    return run_plan(plan, overrides, cores, [*before, *wanted], folder)


def _before(path: Path, stages: Sequence[str]) -> list[str]:
    """The stages from which stages begin, earliest first."""
    plan, found = load_plan(path), list[str]()
    for name in stages:
        found += [one.name for one in reversed(plan.ancestors(plan.stage(name))) if one.name not in found]
    return found


def _may_hide(stage: str, what: str) -> bool:
    return any(what in one.hides for one in FIGURES if one.stage == stage)


def _values(figure: Figure, found: Sequence[PlanRun]) -> list[float]:
    kept = [run.scores[figure.stage][figure.score] for run in found if figure.score in run.scores.get(figure.stage, {})]
    return [score.value for score in kept]


def _row(figure: Figure, runs: Mapping[str, Sequence[PlanRun]]) -> list[str]:
    """A figure of every variant, and whether every seed of the pretrained one is better than every other's."""
    score = next(iter(runs.values()))[0].scores[figure.stage][figure.score]
    chance = score.chance
    cells = {variant: _values(figure, found) for variant, found in runs.items()}
    shown = [_shown(values) for values in cells.values()]
    with_it, without = cells[PRETRAINED], cells[SCRATCH]
    if score.lower_is_better:
        with_it, without = [-one for one in with_it], [-one for one in without]
    if len(with_it) == 1:
        return [figure.task, "-" if chance is None else f"{chance:.3f}", *shown, "one seed"]
    helps = "helps" if min(with_it) > max(without) else "hurts" if max(with_it) < min(without) else "within the range"
    return [figure.task, "-" if chance is None else f"{chance:.3f}", *shown, helps]


def _shown(values: Sequence[float]) -> str:
    return "-" if not values else f"{values[0]:.3f}" if len(values) == 1 else str(Spread.of(values))


def _ratio(figure: Figure, runs: Mapping[str, Sequence[PlanRun]]) -> Ratio:
    with_it, without = (_values(figure, runs[variant]) for variant in (PRETRAINED, SCRATCH))
    return Ratio(f"{figure.task}: pretrained / from scratch", over(with_it, [max(one, 1e-3) for one in without]))


def page_of(found: Mapping[str, Any]) -> str:
    """``docs/tasks.md`` from the content of the result file."""
    seeds = found["settings"]["seeds"]
    parts = [
        "# Downstream tasks",
        "Written by `python -m benchmarks tasks` from its "
        f"[result](../benchmarks/results/{found['benchmark']}-cpu.json); do not edit.",
        "One small model learns to describe [generated scenes](data.md#generated-scenes-source-scenes) and is then "
        "fine-tuned for each task ([plan](../configs/plans/tasks.yaml), [how tasks are scored](evaluation.md)). "
        "Another learns in context ([plan](../configs/plans/few_shot.yaml)); without examples it knows none of the "
        "names. "
        "*Chance* is the best constant answer, or a random option. *Text alone* and *picture alone* are the same "
        "stages, from new weights, with samples whose picture is black or whose text is `?`: what these reach, a model "
        "reaches that ignores the other side. The options of a question stay visible to *picture alone*. "
        f"Seeds: {seeds} of the first two (median, least to most) for {', '.join(REPEATED)}, else one. *Pretraining* "
        "helps or hurts "
        "where every seed does better or worse than every seed from scratch. Options with equal scores count as wrong, "
        "so that a model that scores all alike lies below chance.",
        *(markdown_table(table["columns"], table["rows"]) for table in found["tables"]),
    ]
    machine = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
    kept = " Runs that earlier commits had finished were taken over." if found["settings"].get("runs_kept") else ""
    parts.append(f"Measured on {found['date'][:10]}, {found['cpu']}, {machine}, commit {found['commit'][:10]}.{kept}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_page(main_of("tasks", __doc__, run, add_own), PAGE, page_of)
