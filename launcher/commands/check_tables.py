"""The tables of ``omnivl check``."""

from typing import Any

from engine.plan.batches import batch_in_words
from engine.plan.plan import Plan
from engine.run.preflight.findings import under_heading
from engine.telemetry.console import PlainConsole, PlainTable, titled


def print_summary(plan: Plan, summary: dict[str, Any]) -> None:
    """Prints what ``launcher.commands.check.summarize`` found, with ``offline`` and ``notes``."""
    console = PlainConsole()
    known = "" if summary["world_size_known"] else " (not known yet: --world-size sets it)"
    processes = f"{summary['world_size']} process{'es' if summary['world_size'] != 1 else ''}{known}"
    stages = f"{len(plan.stages)} stage{'s' if len(plan.stages) != 1 else ''}"
    console.print(titled(plan.name, f": {stages}, seed {plan.seed}, {processes}"))
    for number, stage in enumerate(summary["stages"], start=1):
        console.print()
        console.print(titled(f"{number}. {stage['name']}", f", from {stage['init_from'] or 'new weights'}"))
        rows = PlainTable.grid(padding=(0, 2))
        for title, text in _rows(stage):
            rows.add_row(f"   {title}", text)
        console.print(rows)
    if summary["earlier_fields"]:
        lines = [line for found in summary["earlier_fields"].values() for line in found]
        console.print("\nFields of earlier spelling, which are read as those of today:", soft_wrap=True)
        console.print("\n".join(lines), soft_wrap=True)
        files = " ".join(summary["earlier_fields"])
        console.print(f"`omnivl upgrade {files} --write` rewrites them.", soft_wrap=True)
    if summary["offline"]:
        console.print("\n--offline: data, weights and tokenizers were not looked at.", soft_wrap=True)
    elif summary["notes"]:
        console.print("\n".join(["", *under_heading(summary["notes"])]), soft_wrap=True)


def _tied(pipeline: dict[str, Any]) -> str:
    """The layers that several stages have, grouped by these stages, and the memory and traffic of their copies."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, stages in pipeline["tied"].items():
        groups.setdefault(tuple(stages), []).append(name)
    runs = [
        f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''} on {' and '.join(map(str, stages))}"
        for stages, names in groups.items()
    ]
    copies = sum(part["copies"] for part in pipeline["stages"]) / 1e6
    sent = pipeline["tied_bytes_per_step"] / 2**20
    return f"{', '.join(runs)}: {copies:.1f} M parameters of copies, {sent:,.0f} MiB of gradients and weights a step"


def _not_accumulated(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """The line about losses that accumulation gives no more samples to compare; none where there are no such."""
    keys, size = stage["compared_within_a_micro_batch"], stage["micro_batch_size_per_gpu"] * stage["replicas"]
    if not keys:
        return []
    verb = "compares" if len(keys) == 1 else "compare"
    told = f"{', '.join(keys)} {verb} the samples of one micro-batch, at most {size:,}, not those of the whole step"
    if able := stage["comparable_across_micro_batches"]:
        told += f" ({' and '.join(able)} can: batch.contrast: global)"
    return [("negatives", told)]


def _rows(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """The printed lines about a stage."""
    accumulation = stage["gradient_accumulation_steps"]
    batch = batch_in_words(stage["micro_batch_size_per_gpu"], accumulation, stage["replicas"])
    parts = dict(stage["parameters"])
    trained, frozen, twins = (parts.pop(name) for name in ("trained", "frozen", "momentum"))
    apart = (("frozen", frozen), ("momentum twins", twins))
    beside = "".join(f", {name} {count / 1e6:.1f} M" for name, count in apart if count)
    sizes = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in parts.items())
    rows = [
        ("steps", f"{stage['steps']:,}, {stage['samples']:,} samples{_epochs(stage)}"),
        ("batch", batch),
        *_not_accumulated(stage),
        ("data", ", ".join(f"{share:.0%} {key}" for key, share in stage["mixture"].items())),
        ("objectives", ", ".join(f"{name} x {weight:g}" for name, weight in stage["objectives"].items())),
        ("host", f"{stage['host']}, {stage['precision']}, learning rate {stage['lr']:g}"),
        ("parameters", f"{(trained + frozen) / 1e6:.1f} M ({sizes}){beside}"),
    ]
    if (lora := stage["lora"]) is not None:
        on = " and ".join(lora["on"])
        told = f"rank {lora['rank']} on {on}; with heads {trained / 1e6:.2f} M parameters are trained"
        rows.append(("adapters", told))
    if (pipeline := stage["pipeline"]) is not None:
        for number, part in enumerate(pipeline["stages"], start=1):
            first, last = part["layers"]
            held = part["micro_batches_held"]
            size = f"{part['cost']:.0%} of the {pipeline['by']}, {part['parameters'] / 1e6:.1f} M parameters"
            copies = part["copies"] / 1e6
            size += f" ({copies:.1f} M of them copies of layers that another stage trains), " if copies else ", "
            size += f"activations of {held} micro-batch{'' if held == 1 else 'es'} at "
            size += f"{part['activation_bytes'] / 2**20:,.0f} MiB"
            rows.append((f"stage {number}", f"{first} to {last}: {size}"))
        rows.append(("bubble", f"{pipeline['bubble']:.0%} of the time, with {accumulation} micro-batches a step"))
        if pipeline["tied"]:
            rows.append(("on two stages", _tied(pipeline)))
    if (memory := stage["memory"]) is not None:
        share, transient = memory["share"] / 1e9, memory["transient"] / 1e9
        rows.append(("memory", f"{share:.2f} GB a process and up to {transient:.2f} GB for a while, activations aside"))
    rows += [("warning", warning) for warning in stage["warnings"]]
    if stage["curve"]:
        rows.append(("curve", f"{', '.join(stage['curve'])} every {stage['curve_seconds']:g} s of training"))
    return [*rows, ("evaluates", ", ".join(stage["tasks"]))] if stage["tasks"] else rows


def _epochs(stage: dict[str, Any]) -> str:
    """How many passes over which data the steps are, where the plan says so."""
    epoch = stage["epoch"]
    if epoch is None:
        return ""
    return f": {stage['epochs']:g} of {epoch['samples']:,} samples of {epoch['entry']}, {epoch['share']:.0%} of them"
