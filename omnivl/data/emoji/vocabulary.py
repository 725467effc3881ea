"""A WordPiece vocabulary from a list of texts, the same on every run.

The trainer of the ``tokenizers`` library breaks ties by the order of a hash table that differs between processes (four
runs gave four vocabularies), so the merges are counted here; the library still cleans and splits the texts.

Source: WordPiece by most frequent pairs, Sennrich et al., arXiv 1508.07909, algorithm 1, with BERT's ``##`` for the
inside of words.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from tokenizers import normalizers, pre_tokenizers

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
_PRINTABLE = tuple(chr(code) for code in range(33, 127) if not chr(code).isupper())

Pair = tuple[str, str]


def train_vocabulary(texts: Iterable[str], size: int) -> list[str]:
    """Trains a lower-case WordPiece vocabulary.

    Args:
        texts: Texts; each occurrence counts.
        size: Number of tokens, special ones included; fewer if the words run out of pairs.

    Returns:
        Tokens by id: the special tokens, all characters (printable ASCII and those of the texts, at the start of a
        word and inside), then merged pieces from frequent to rare. Ties go to the alphabetically first pair.
    """
    words = _count_words(texts)
    spelled = [_spell(word) for word in sorted(words)]
    counts = [words[word] for word in sorted(words)]
    characters = {piece for spelling in spelled for piece in spelling}
    characters.update(_PRINTABLE)
    characters.update(f"##{character}" for character in _PRINTABLE if character.isalnum())
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *sorted(characters)])
    for piece in _merges(spelled, counts):
        if len(vocabulary) >= size:
            break
        vocabulary.setdefault(piece)
    return list(vocabulary)


def _count_words(texts: Iterable[str]) -> Counter[str]:
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    return words


def _spell(word: str) -> list[str]:
    return [word[0], *(f"##{character}" for character in word[1:])]


def _merges(spelled: list[list[str]], counts: list[int]) -> Iterable[str]:
    """Yields merged pieces, most frequent pair first. ``spelled`` is changed along the way."""
    totals: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)
    for number, spelling in enumerate(spelled):
        for pair in pairwise(spelling):
            totals[pair] += counts[number]
            places[pair].add(number)
    queue = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(queue)
    while queue:
        total, pair = heapq.heappop(queue)
        if totals[pair] != -total:
            continue  # an outdated entry: the pair was queued again when its count changed
        piece = pair[0] + pair[1].removeprefix("##")
        changed: set[Pair] = set()
        for number in sorted(places.pop(pair)):
            before = spelled[number]
            after = _merge(before, pair, piece)
            for old in pairwise(before):
                totals[old] -= counts[number]
                changed.add(old)
            for new in pairwise(after):
                totals[new] += counts[number]
                places[new].add(number)
                changed.add(new)
            spelled[number] = after
        for touched in changed:
            if totals[touched] > 0:
                heapq.heappush(queue, (-totals[touched], touched))
        yield piece


def _merge(spelling: list[str], pair: Pair, piece: str) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(spelling):
        if tuple(spelling[position : position + 2]) == pair:
            merged.append(piece)
            position += 2
        else:
            merged.append(spelling[position])
            position += 1
    return merged
