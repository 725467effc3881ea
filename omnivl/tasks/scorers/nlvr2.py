"""NLVR2: consistency over the pairs of pictures of one sentence.

Source: Suhr et al., arXiv 1811.00491, section 5; nlvr2/eval/metrics.py of github.com/lil-lab/nlvr.
"""

from collections.abc import Sequence

from omnivl.errors import DataError


def sentence_of(identifier: str) -> str:
    """What pairs of one sentence share: ``dev-850-2-0`` without its third part, the pair, is ``dev-850--0``.

    Raises:
        DataError: The identifier has fewer than three parts.
    """
    parts = identifier.split("-")
    if len(parts) < 3:
        raise DataError(f"identifier {identifier!r} of NLVR2; allowed is split-set-pair-sentence, as in 'dev-850-2-0'")
    parts[2] = ""
    return "-".join(parts)


def consistent(identifiers: Sequence[str], right: Sequence[bool]) -> dict[str, bool]:
    """Whether all pairs of a sentence are answered right, by ``sentence_of``; consistency is the mean.

    Raises:
        DataError: See ``sentence_of``.
    """
    found: dict[str, bool] = {}
    for identifier, one in zip(identifiers, right, strict=True):
        sentence = sentence_of(identifier)
        found[sentence] = found.get(sentence, True) and one
    return found
