"""Predictions in the forms that the servers of benchmarks take.

Sources: VQA v2: visualqa.org/challenge. GQA: cs.stanford.edu/people/dorarad/gqa/evaluate.html. NLVR2:
    nlvr2/eval/metrics.py of github.com/lil-lab/nlvr, which reads lines without a header. VCR: models/README.md and
    eval_for_leaderboard.py of github.com/rowanz/r2c. VisDial:
    github.com/batra-mlp-lab/visdial-challenge-starter-pytorch. Captions: the result files of
    github.com/tylin/coco-caption, which nocaps.org takes too.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError, UserError, did_you_mean
from omnivl.tasks.predicting import Line, PredictingTask, identifiers, json_lines

Kind = type[int] | type[str]


@dataclass(frozen=True)
class Format:
    """A form of predictions.

    Attributes:
        predicted: Fields of a prediction that it needs.
        write: The file's text, from the lines of all samples.
        identified: Fields of a sample by which the server knows it, none of them twice; and whether they are whole
            numbers or texts.
    """

    predicted: tuple[str, ...]
    write: Callable[[Sequence[Line]], str]
    identified: Mapping[str, Kind] = field(default_factory=dict)


def choose_format(name: str, task: PredictingTask) -> Format:
    """The format of that name.

    Raises:
        UserError: There is none, or the task does not predict what it needs.
    """
    found = FORMATS.get(name)
    if found is None:
        change = did_you_mean(name, [*FORMATS], "name one of them")
        raise UserError(f"--format: got {name!r}; allowed are {', '.join(map(repr, FORMATS))}; {change}")
    lacking = [one for one in found.predicted if one not in task.predicts]
    if lacking:
        fitting = ", ".join(repr(one) for one, form in FORMATS.items() if {*form.predicted} <= {*task.predicts})
        change = (
            "set the task's 'reasons'" if "reason_scores" in lacking and "scores" in task.predicts else "choose one"
        )
        raise UserError(
            f"--format: got {name!r}, which needs {' and '.join(map(repr, lacking))}, where task {task.name!r} "
            f"predicts {', '.join(map(repr, task.predicts))}; allowed are {fitting}; {change}"
        )
    return found


def with_identifiers(name: str, samples: Sequence[Sample]) -> list[dict[str, int | str]]:
    """The identifiers of samples in the types that a format needs.

    Args:
        name: Of the format.
        samples: The samples.

    Raises:
        DataError: A sample lacks one or has another type of it, or two samples have the same.
    """
    kinds, found = FORMATS[name].identified, []
    seen: dict[tuple[int | str, ...], str] = {}
    for sample in samples:
        known = identifiers(sample)
        own = {field: _typed(known.get(field), field, kind, name, sample) for field, kind in kinds.items()}
        other = seen.setdefault(tuple(own.values()), sample.where)
        if own and other != sample.where:
            shown = ", ".join(f"{field} {value!r}" for field, value in own.items())
            raise DataError(
                f"{sample.where}: {shown} is that of {other} too; the format {name!r} takes one prediction for each; "
                "filter with --where"
            )
        found.append(own)
    return found


def _typed(value: int | str | None, field: str, kind: Kind, name: str, sample: Sample) -> int | str:
    """An identifier as a whole number or a text; whole numbers may be written as texts."""
    if value is not None and (kind is str or re.fullmatch(r"-?[0-9]+", str(value))):
        return kind(value)
    allowed = "a whole number" if kind is int else "a text or a whole number"
    got = "nothing" if value is None else repr(value)[:80]
    raise DataError(
        f"{sample.where}: {field!r} is {got}; allowed: {allowed}, which the format {name!r} needs; convert the data "
        "with that field, or choose the format 'jsonl'"
    )


def _list(row: Callable[[Line], Any], lines: Sequence[Line]) -> str:
    """A list in JSON."""
    return json.dumps([row(line) for line in lines]) + "\n"


def _table(header: Sequence[str], row: Callable[[Line], Sequence[Any]], lines: Sequence[Line]) -> str:
    """A CSV file; an empty header is none."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerows([header] if header else [])
    writer.writerows(row(line) for line in lines)
    return made.getvalue()


def _vqa(line: Line) -> Line:
    return {"question_id": line["question_id"], "answer": line["answer"]}


def _gqa(line: Line) -> Line:
    return {"questionId": line["question_id"], "prediction": line["answer"]}


def _nlvr2(line: Line) -> list[str]:
    allowed = {"true": "True", "false": "False"}
    if line["answer"] not in allowed:
        raise DataError(
            f"{line['where']}: the answer is {line['answer']!r}; allowed in the format 'nlvr2': 'true' and 'false'; "
            "train the head with these two answers"
        )
    return [line["identifier"], allowed[line["answer"]]]


def _captioned(line: Line) -> Line:
    return {"image_id": line["image_id"], "caption": line["caption"]}


def _visdial(line: Line) -> Line:
    """Ranks of the options from 1, each once: options of equal scores in their order."""
    order = np.argsort(-np.asarray(line["scores"]), kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return {"image_id": line["image_id"], "round_id": line["round_id"], "ranks": ranks.tolist()}


_VCR_OPTIONS = 4
_VCR_GROUPS = ("answer", *(f"rationale_conditioned_on_a{answer}" for answer in range(_VCR_OPTIONS)))
_VCR_HEADER = ("annot_id", *(f"{group}_{place}" for group in _VCR_GROUPS for place in range(_VCR_OPTIONS)))


def _vcr(line: Line) -> list[Any]:
    """Probabilities of the answers, and of the rationales given each of them."""
    groups = [line["scores"], *line["reason_scores"]]
    if [len(one) for one in groups] != [_VCR_OPTIONS] * len(_VCR_GROUPS):
        raise DataError(
            f"{line['where']}: got {len(line['scores'])} options and {len(line['reason_scores'][0])} reasons; allowed "
            f"in the format 'vcr': {_VCR_OPTIONS} each; choose the format 'jsonl'"
        )
    return [line["annot_id"], *(share for one in groups for share in _shares(one))]


def _shares(scores: Sequence[float]) -> list[float]:
    """Softmax."""
    powers = np.exp(np.asarray(scores, dtype=np.float64) - np.max(scores))
    shares: list[float] = (powers / powers.sum()).tolist()
    return shares


_CAPTIONS = Format(("caption",), partial(_list, _captioned), {"image_id": int})

FORMATS: Mapping[str, Format] = {
    "jsonl": Format((), json_lines),
    "vqa": Format(("answer",), partial(_list, _vqa), {"question_id": int}),
    "gqa": Format(("answer",), partial(_list, _gqa), {"question_id": str}),
    "nlvr2": Format(("answer",), partial(_table, (), _nlvr2), {"identifier": str}),
    "vcr": Format(("scores", "reason_scores"), partial(_table, _VCR_HEADER, _vcr), {"annot_id": str}),
    "visdial": Format(("scores",), partial(_list, _visdial), {"image_id": int, "round_id": int}),
    "coco": _CAPTIONS,
    "nocaps": _CAPTIONS,
}
"""All formats by their names."""
