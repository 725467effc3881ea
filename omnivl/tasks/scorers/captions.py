r"""Scores of captions by the field's own programs: BLEU-4, METEOR, ROUGE-L, CIDEr-D and SPICE of pycocoevalcap.

Source: Chen et al., arXiv 1504.00325; CIDEr-D: Vedantam et al., arXiv 1411.5726 (sigma 6, n up to 4, counts clipped,
    times 10); SPICE: Anderson et al., arXiv 1607.08822; pycocoevalcap/eval.py of github.com/salaniz/pycocoevalcap.
Differs: line breaks of any kind within a caption become spaces. The official program keeps all but ``\n``, takes each
    for a new caption, and so compares all later captions with references of other pictures. METEOR and SPICE are left
    out where they cannot run; the official program fails.

All scores are of a **set** of captions. Document frequencies of CIDEr-D come from the references of the set that is
evaluated, so that a subset, or a single picture (0 always), has another score than its part in the whole. BLEU-4
('closest' reference length) and METEOR are no means of the scores of single captions.

The Penn Treebank tokenizer, METEOR and SPICE need java, SPICE also models that it would download. The tokenizer lowers
the case, splits clitics off ("isn't" to "is n't"), and drops marks but brackets ("(" stays, as "-lrb-"). Without java
``plain_tokens`` does nearly the same: those scores are near the official ones, not equal to them.
"""

import contextlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omnivl.errors import DataError, UserError

SCORES = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "SPICE")
_TOKENIZER = "stanford-corenlp-3.4.1.jar"
_SPICE_MODELS = "stanford-corenlp-3.6.0-models.jar"

_MARKS = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
"""What the official program drops. Brackets are not among it: its list has them in upper case, texts in lower case."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)")
_TWO_WORDS = re.compile(r"\b(?:(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(lem)(me)|(gim)(me))\b")
_TOKEN = re.compile(
    r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)|(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|jr|vs|etc)\."
    r"|\d+(?:[.,:/]\d+)+(?:-\w+)*|\w+(?:[-/.']\w+)*|\.\.\.|--|[^\w\s]"
)

Texts = dict[int, list[str]]
"""Tokenized texts of each picture, as pycocoevalcap takes them."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        values: Each score that could be computed; shares, but CIDEr-D, which is at most 10.
        each: ``ROUGE-L``, ``CIDEr-D`` and ``SPICE`` of each caption, ``[N]``, whose means the values are.
        left_out: Why others are not among them, by name.
        tokenizer: ``ptb`` the official one, or ``plain`` where there is no java.
    """

    values: dict[str, float]
    each: dict[str, NDArray[np.float64]]
    left_out: dict[str, str]
    tokenizer: Literal["ptb", "plain"]


def caption_scores(
    written: Sequence[str], references: Sequence[Sequence[str]], scores: Sequence[str] = SCORES
) -> CaptionScores:
    """Scores captions by their references.

    Args:
        written: The caption of each picture, ``[N]``, N at least 1; may be empty.
        references: The references of each, at least one.
        scores: Which of ``SCORES``. METEOR and SPICE take long to start.

    Raises:
        UserError: pycocoevalcap is not installed, or its tokenizer fails.
        DataError: There is no caption, or a picture has no reference.
    """
    if not written or len(written) != len(references):
        raise DataError(f"{len(written)} captions and {len(references)} pictures' references cannot be scored")
    if bare := [place for place, own in enumerate(references) if not own]:
        raise DataError(f"{len(bare)} of {len(references)} pictures have no reference, the first at {bare[0]}")
    folder = package_folder()
    java = shutil.which("java")
    every = [*written, *(text for own in references for text in own)]
    tokens = ptb_tokens(every, folder, java) if java else [plain_tokens(text) for text in every]
    given: Texts = {place: [tokens[place]] for place in range(len(written))}
    rest = iter(tokens[len(written) :])
    right: Texts = {place: [next(rest) for _ in own] for place, own in enumerate(references)}
    found = CaptionScores({}, {}, {}, "ptb" if java else "plain")
    for name in scores:
        if name in _NEED_JAVA and not java:
            found.left_out[name] = "needs java, which is not on this machine's PATH"
            continue
        try:
            value, each = _OF_NAME[name](right, given)
        except _NotRunError as reason:
            found.left_out[name] = str(reason)
            continue
        found.values[name] = value
        if each is not None:
            found.each[name] = each
    return found


def package_folder() -> Path:
    """The folder of pycocoevalcap.

    Raises:
        UserError: It is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("pycocoevalcap is not installed, which scores captions; install the extra 'tasks'")
    return Path(spec.submodule_search_locations[0])


def ptb_tokens(texts: Sequence[str], folder: Path, java: str) -> list[str]:
    """Texts as the official tokenizer has them, words with spaces between.

    It is run as pycocoevalcap runs it, but without files beside the package, which may not be writable.

    Args:
        texts: Any texts.
        folder: See ``package_folder``.
        java: The program.

    Raises:
        UserError: It fails.
    """
    program = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    command = [java, "-cp", str(folder / "tokenizer" / _TOKENIZER), *program]
    lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise UserError(f"the tokenizer of captions failed ({java}); it said {said!r}")
    return [" ".join(word for word in line.split(" ") if word and word not in _MARKS) for line in found]


def plain_tokens(text: str) -> str:
    """A text nearly as the official tokenizer has it, without java."""
    split = _TWO_WORDS.sub(lambda found: " ".join(part for part in found.groups() if part), text.lower())
    words = _TOKEN.findall(_CLITIC.sub(r" \1 ", split).replace('"', " ").replace("—", " -- "))
    return " ".join(_BRACKETS.get(word, word) for word in words if word not in _MARKS)


class _NotRunError(Exception):
    """Why a program that needs java did not run."""


Found = tuple[float, NDArray[np.float64] | None]


def _bleu(references: Texts, written: Texts) -> Found:
    from pycocoevalcap.bleu.bleu import Bleu

    return float(Bleu(4).compute_score(references, written, verbose=0)[0][3]), None


def _rouge(references: Texts, written: Texts) -> Found:
    from pycocoevalcap.rouge.rouge import Rouge

    mean, each = Rouge().compute_score(references, written)
    return float(mean), np.asarray(each, dtype=np.float64)


def _cider(references: Texts, written: Texts) -> Found:
    from pycocoevalcap.cider.cider import Cider

    mean, each = Cider().compute_score(references, written)
    return float(mean), np.asarray(each, dtype=np.float64)


def _meteor(references: Texts, written: Texts) -> Found:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return float(scorer.compute_score(references, written)[0]), None
    except (OSError, ValueError) as error:
        # Deleted, it would wait for the lock that it still holds, and flush what no program takes.
        scorer.lock.release()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        raise _NotRunError(f"its java program failed: {error}") from error


def _spice(references: Texts, written: Texts) -> Found:
    models = package_folder() / "spice" / "lib" / _SPICE_MODELS
    if not models.exists():
        raise _NotRunError(
            "its models are not there; `python -m pycocoevalcap.spice.get_stanford_models` downloads them"
        )
    from pycocoevalcap.spice.spice import Spice

    try:
        mean, each = Spice().compute_score(references, written)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise _NotRunError(f"its java program failed (it was written for java 8): {error}") from error
    return float(mean), np.array([one["All"]["f"] for one in each], dtype=np.float64)


_NEED_JAVA = frozenset({"METEOR", "SPICE"})
_OF_NAME: dict[str, Callable[[Any, Any], Found]] = {
    "BLEU-4": _bleu,
    "METEOR": _meteor,
    "ROUGE-L": _rouge,
    "CIDEr-D": _cider,
    "SPICE": _spice,
}
