"""Writes ``docs/plan.md`` from the plan's dataclasses: ``python -m engine.plan.reference [--check]``.

The meaning of a field is written once, in the ``Attributes`` of its dataclass.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.plan.plan import SHARED_SECTIONS, Plan, StagePlan
from engine.plan.schema import describe, field_types, kinds, members
from engine.plan.yaml import show_value
from omnivl.architectures import Architecture, OmniVL
from omnivl.docstrings import attribute_texts

REFERENCE = Path("docs/plan.md")

_INTRODUCTION = """# The plan

<!-- Written by `make docs` from the dataclasses. Do not edit. -->

A run is one YAML file. Every section below is a mapping; a field without a default has to be given. `omnivl check
PLAN.yaml` prints what a plan would do, or everything that is wrong in it, and needs no GPU.

- **What is looked at.** `omnivl check`, `omnivl submit`, `omnivl sweep run --on slurm` for its runs together, and
  `omnivl pretrain` before its first step look at what every stage names outside of the plan: tokenizers are loaded;
  starting weights are compared with the model by name and shape, an earlier stage's weights likewise; of every data
  entry and every evaluation the source has to be there with all its shards, hold what kind and filter ask for, and give
  at least one sample that can be used. All that is wrong is told at once, with its line. `submit`, sweeps and
  `check --run-folder` also look whether the run can go on in its folder. Paths are taken from the working folder.
- **What is not.** The look is bounded: the presence of 10,000 shards; 256 shards that have an index; of others the
  first 2,000 samples of 8 shards; 10 seconds a source and 60 in all, behind which only presence is looked at. What was
  left out is said, and how many bad samples a run will leave out; a filter that leaves nothing of a part is no mistake
  yet. Weights are not compared by value, and evaluation's pictures not decoded. Streams (`pipe:`, `http://`, `s3://`
  ...) are opened by `pretrain` alone, and there to their first sample. `--offline` leaves the look out, on a machine
  that does not see the data; a stated `vocab_size` then stands for the tokenizer, and a stated `num_answers` or
  `num_classes` for a list whose file is not there. Other lists, model files and pipeline profiles decide sizes, and are
  read always.
- **Overrides.** `omnivl check PLAN.yaml stages.joint.optimizer.lr=2e-4` sets a field from the command line. A member of
  a list is named by its index, its `name` or its `kind`.
- **Shared sections.** `model`, `parallel` and `batch` are given once for all stages; a stage gives only the fields that
  it changes.
- **Shorthand.** Among `objectives` and `evaluate.tasks` a bare kind stands for a mapping: `mlm` for `{kind: mlm}`.
- **Earlier spelling.** Fields that were called otherwise are read as those of today; `omnivl check` names their lines.
  `omnivl upgrade PLAN.yaml --write` rewrites them, in model files and sweeps too; comments and order stay.
- **YAML.** `1e-4` is a number; only `true` and `false` are booleans; a key may stand once; tags that do not fit their
  value, infinities, NaN and control characters are refused.
- **Limits.** Beside the ranges below, numbers have limits far beyond every machine: 1e9 either way where nothing else
  is said, 1,000 layers, a width of 65,536, 4,096 experts, 10,000,000 words, 1,024 processes or workers on a machine, a
  learning rate of 100 (`engine/plan/limits.py`).
"""

_CHANGING = """## Changing a run

A run is resumed by the same command, or by `omnivl pretrain runs/NAME`: the folder keeps the plan with the overrides
that it was started with. `check`, `estimate`, `profile` and `submit` take the folder as well; `evaluate`, `embed`,
`export`, `routing` and `report` read nothing else. Another plan or other overrides in the same folder are compared with
what is there (`engine/run/amendment.py`):

| what | stage that has not begun | running stage, or the last one with more steps \
| stage after which another has begun |
|---|---|---|---|
| `name`, `launch`, `checkpoint` (`keep_last`, `every` ...), `guard`, `logging`, `evaluate`; workers, caches and \
`max_bad_fraction` of `loader` \
| free | free | free |
| `parallel` but `precision` | free | free | free |
| `batch` | free \
| free: the next step has the new size, the learning rate is not changed, no sample is left out or taken twice \
| free |
| `steps`, more, `schedule: constant` | free | free | refused |
| `steps`, more, `linear` or `cosine` | `--amend` | `--amend` | refused |
| `steps`, fewer | `--amend` | `--amend`, above what is saved | refused |
| `optimizer` but `betas` and `kind` | `--amend` | `--amend`, from the next step on | refused |
| `weight` and `weight_warmup_steps` of an objective | `--amend` | `--amend`, from the next step on | refused |
| `weight` (above 0), `augment`, `frames`, `caption`, `prompts`, `language` of a data entry | `--amend` \
| `--amend`, from the next step on | refused |
| `parallel.precision` | `--amend` | `--amend` | refused |
| other fields of `loader` | `--amend` | `--amend` | `--amend` |
| `optimizer.betas`: the moments are corrected for what they were averaged with | `--amend` | refused | refused |
| `optimizer.kind`: Muon has one moment of a matrix, AdamW two | `--amend` | refused | refused |
| other fields of `data`: the position in the data would be lost | `--amend` | refused | refused |
| `model`, other fields of `objectives`, `freeze`, `lora`, `weights`, `init_from`, `name` of a stage: \
weights and moments would not fit \
| `--amend` | refused | refused |
| stages added at the end | free | free | - |
| stages taken away | `--amend` | refused | refused |
| `seed`, `tokenizer` | refused | refused | refused |

What is refused for a stage that has begun is a stage of its own: add one that starts from it (`init_from`).

**The schedule.** The learning rate of a step is a function of the plan and the step's number, never of what happened
before. An amended stage goes on with the rate that the amended plan gives to the next step, as if it had been so from
the beginning: a cosine that becomes longer does not start anew, its rate rises to where the longer one is at that step.
The run prints the rate of the next step by both plans and that of the last step, and warns where the steps that are
left have less than a tenth of `optimizer.lr` on average, which is so where a few steps are added to a cosine at its
end: `optimizer.schedule=constant` with the `optimizer.lr` that is wanted trains on evenly. What was changed, and after
which step, is in the run's `amendments.json`. `--fresh --stage NAME` deletes that stage and those after it; the stages
before it have to be what they were.

Host, layout and precision may change at the same start: under ZeRO-3 and in a pipeline an amended run equals the plain
one to rounding (`tests/distributed/test_amend.py`).
"""


def render() -> str:
    """The reference, in Markdown."""
    parts = [_INTRODUCTION, _CHANGING]
    for cls in sections(Plan):
        parts.append(f"## {_title(cls)}\n\n{_summary(cls)}\n\n{_table(cls)}")
    parts.append(f"## Presets\n\n{_presets()}")
    return "\n".join(parts)


def sections(root: type) -> list[type]:
    """All dataclasses that a plan can hold, in the order in which they first occur, section by section."""
    found: dict[type, None] = {}

    def visit(cls: type) -> None:
        if cls in found:
            return
        found[cls] = None
        for annotation in field_types(cls).values():
            for inner in _dataclasses_in(annotation):
                visit(inner)

    visit(root)
    return list(found)


def main() -> None:
    """Writes the reference, or with ``--check`` fails if the file is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the file differs instead of writing it")
    if not parser.parse_args().check:
        REFERENCE.write_text(render(), encoding="utf-8")
        return
    written = REFERENCE.read_text(encoding="utf-8") if REFERENCE.exists() else ""
    difference = difflib.unified_diff(written.splitlines(), render().splitlines(), str(REFERENCE), "now", lineterm="")
    if lines := list(difference):
        print(*lines[:40], f"{REFERENCE} is not current: run `make docs`", sep="\n", file=sys.stderr)
        sys.exit(1)


def _dataclasses_in(annotation: Any) -> Iterator[type]:
    for member in members(annotation):
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            yield member
        for argument in getattr(member, "__args__", ()):
            yield from _dataclasses_in(argument)


def _title(cls: type) -> str:
    names = list(kinds(cls))
    return f"{cls.__name__} (`kind: {names[0]}`)" if len(names) == 1 else cls.__name__


def _summary(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[0]
    return _code(text.strip())


def _table(cls: type) -> str:
    texts = attribute_texts(cls)
    lines = ["| field | allowed | default | meaning |", "|---|---|---|---|"]
    types = field_types(cls)
    if issubclass(cls, Architecture):
        presets = ", ".join(f"`{name}`" for name in cls.presets)
        meaning = "Row of the table of presets, or YAML file with fields of a model; the other fields override it."
        lines.append(f"| `preset` | {f'{presets} or text' if presets else 'text'} | - | {meaning} |")
    for entry in dataclasses.fields(cls):
        meaning = texts.get(entry.name, "Tells it apart from the others." if entry.name == "kind" else "")
        if not meaning:
            raise LookupError(f"{cls.__name__}.{entry.name} is not told of in the Attributes of its docstring")
        allowed = describe(types[entry.name], _link)
        lines.append(
            f"| `{entry.name}` | {allowed} | {_default(cls, entry)} | {_code(meaning)} |".replace("\\", "\\\\")
        )
    return "\n".join(lines) + "\n"


def _default(cls: type, entry: "dataclasses.Field[Any]") -> str:
    if cls is StagePlan and entry.name in SHARED_SECTIONS:
        return "the plan's"
    if entry.default is not dataclasses.MISSING:
        return f"`{_written(entry.default)}`"
    if entry.default_factory is dataclasses.MISSING:
        return "required"
    value = entry.default_factory()
    return "its defaults" if dataclasses.is_dataclass(value) else f"`{_written(value)}`"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_written(entry) for entry in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_written(entry)}" for name, entry in value.items()) + "}"
    return value if isinstance(value, str) and value.isidentifier() else show_value(value)


def _link(cls: type) -> str:
    anchor = re.sub(r"[^\w -]", "", _title(cls)).lower().replace(" ", "-")
    return f"[{cls.__name__}](#{anchor})"


def _code(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _presets() -> str:
    names = list(OmniVL.presets)
    lines = [f"| field | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
    for entry in dataclasses.fields(OmniVL):
        values = [getattr(preset, entry.name) for preset in OmniVL.presets.values()]
        if any(value != values[0] for value in values):
            shown = " | ".join(f"{value:.4g}" if isinstance(value, float) else show_value(value) for value in values)
            lines.append(f"| `{entry.name}` | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
